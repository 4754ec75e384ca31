"""How reports are shown: written-out reports in, text out. Nothing runs here."""

import io
from typing import Any

import pytest

from shardproof.cli.output import PlainConsole, listed, shape, size, small
from shardproof.cli.report_text import show_cases, show_report

SHA = {"a": "1a2b3c4d" + "0" * 56, "b": "99887766" + "0" * 56, "c": "deadbeef" + "0" * 56}


def tensor(name: str, *shas: str, judged: bool = True, **changes: Any) -> dict[str, Any]:
    hashes = {str(degree): SHA[sha] for degree, sha in enumerate(shas or "aaa", start=1)}
    torch = {
        "exact": False,
        "allclose": True,
        "rtol": 1e-5,
        "atol": 1e-6,
        "max_abs_diff": 4.07e-8,
        "max_ulp": 3,
    }
    plain = {
        "name": name,
        "shape": [608, 1024],
        "dtype": "float32",
        "sha256": hashes,
        "identical": len(set(hashes.values())) == 1,
        "agreement_judged": judged,
        "agrees": True,
        "torch": torch if judged else None,
        "fp64": {"ours": 2.1e-8, "torch": 2.3e-8} if judged else None,
        "seed_allclose": None,
        "findings": [],
    }
    return plain | changes


def case(*tensors: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ranks = [
        {"rank": 0, "largest_bytes": 1245184, "largest_shape": [304, 1024], "bound_bytes": 1245184},
        {"rank": 1, "largest_bytes": 1245180, "largest_shape": [304, 1024], "bound_bytes": 1245184},
    ]
    sums = {"all_reduce": {"calls": 1, "message_bytes": 77824, "sent_bytes": 77824}}
    plain = {
        "name": "linear-row",
        "source": "002_bff0c980e9c9c989.txt",
        "description": "Linear(1024, 608) cut by rows: the bias is added once",
        "degrees": [1, 2, 3],
        "proved": all(item["identical"] for item in tensors),
        "identical": all(item["identical"] for item in tensors),
        "agrees_with_torch": True,
        "within_memory_bound": True,
        "seconds": 1.234,
        "first_difference": None,
        "tensors": list(tensors),
        "memory": {"1": [{**ranks[0], "largest_bytes": 2490368}], "2": ranks},
        "comm": {"1": {"forward": {}, "backward": {}}, "2": {"forward": sums, "backward": {}}},
        "checks": [{"name": "one all_reduce forward", "passed": True, "detail": "1 seen"}],
    }
    return plain | changes


def report(*cases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plain = {
        "proved": all(item["proved"] for item in cases),
        "numerics": "invariant",
        "engine": "threads",
        "transport": "threads",
        "leaves": 8,
        "seed": 12345,
        "degrees": [1, 2, 3],
        "contract": "tree-3 leaves=8 mkl=avx512-strict small=core fp32 torch=2.13.0+cpu",
        "skipped": [],
        "cases": list(cases),
    }
    return plain | changes


def shown(document: dict[str, Any], *, width: int = 80, verdict: str = "Proved.") -> str:
    file = io.StringIO()
    show_report(document, verdict, PlainConsole(file=file, width=width))
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the first table row that starts with `name`."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_a_tensor_is_one_row_with_the_seeds_columns() -> None:
    text = shown(report(case(tensor("weight.grad"))))
    assert row(text, "weight.grad") == [
        "weight.grad", "608x1024", "no", "yes", "4.1e-8", "2.1e-8/2.3e-8", "1a2b3c4d", "yes",
    ]  # fmt: skip
    assert row(text, "tensor")[:3] == ["tensor", "shape", "exact"]


def test_a_difference_shows_every_hash_and_the_degrees() -> None:
    text = shown(report(case(tensor("output"), tensor("weight.grad", "a", "a", "b"))), width=120)
    assert row(text, "weight.grad")[-4:] == ["1", "1a2b3c4d", "NO:", "3"]
    assert "2 1a2b3c4d" in text
    assert "3 99887766" in text
    assert row(text, "output")[-2:] == ["1a2b3c4d", "yes"]
    assert row(text, "linear-row")[:5] != ["linear-row", "1,", "2,", "3", "yes"]


def test_disagreement_with_torch_is_a_loud_no() -> None:
    far = tensor("bias.grad", agrees=False)
    far["torch"] |= {"allclose": False, "max_abs_diff": None}
    text = shown(report(case(far, agrees_with_torch=False, proved=False)))
    assert row(text, "bias.grad")[2:5] == ["no", "NO", "-"]


def test_approximate_is_what_the_report_says_and_not_the_tolerance_alone() -> None:
    text = shown(report(case(tensor("dX", seed_allclose=False, agrees=False))))
    assert row(text, "dX")[2:4] == ["no", "NO"]


def test_a_tensor_that_torch_does_not_know_is_a_fault() -> None:
    lost = tensor("extra", torch=None, fp64=None, findings=["not recorded by plain torch"])
    text = shown(report(case(lost)))
    assert row(text, "extra")[2:6] == ["-", "NO", "-", "-"]
    assert "extra: not recorded by plain torch" in text


def test_facts_of_a_case_are_readable() -> None:
    text = shown(report(case(tensor("output"))))
    assert "checks  passed    one all_reduce forward: 1 seen" in text
    assert "memory  degree 1  largest 2.4 MiB (304x1024) on rank 0, bound 1.2 MiB\n" in text
    assert "degree 2  largest 1.2 MiB (304x1024) on rank 0, bound 1.2 MiB\n" in text
    assert "sent    degree 1  nothing\n" in text
    assert "degree 2  forward 1 all_reduce (76.0 KiB)\n" in text


def test_degrees_that_send_the_same_share_a_line() -> None:
    full = case(tensor("output"))
    both = full["comm"]["2"] | {"backward": {"all_gather": {"calls": 2, "message_bytes": 131072}}}
    text = shown(report(full | {"comm": {"1": {}, "2": both, "3": both, "4": both, "8": both}}))
    assert "degree 2-4, 8  forward 1 all_reduce (76.0 KiB)\n" in text
    assert " backward 2 all_gather (128.0 KiB)\n" in text


def test_a_long_name_breaks_at_a_dot_where_room_is_short() -> None:
    document = report(case(tensor("hidden.weight.momentum_buffer")))
    assert "\n hidden.weight.  608x1024" in shown(document)
    assert "\n momentum_buffer\n" in shown(document)
    assert "\n hidden.weight.momentum_buffer  608x1024" in shown(document, width=120)


def test_memory_beyond_its_bound_is_named() -> None:
    full = case(tensor("output"), within_memory_bound=False, proved=False)
    full["memory"]["2"][1]["largest_bytes"] = 2490368
    text = shown(report(full))
    assert "degree 2  largest 2.4 MiB (304x1024) on rank 1, bound 1.2 MiB EXCEEDED" in text


def test_a_failed_check_is_named() -> None:
    check = {"name": "one all_reduce forward", "passed": False, "detail": "at degree 2: 3 seen"}
    text = shown(report(case(tensor("output"), checks=[check], proved=False)))
    assert "FAILED    one all_reduce forward: at degree 2: 3 seen" in text
    assert "0 of 1" in text


def epochs(num: int, *, bad: int = 0) -> list[dict[str, Any]]:
    return [
        tensor(f"epoch {epoch}: {name}", "a", "b" if epoch == bad else "a", judged=False)
        for epoch in range(1, num + 1)
        for name in ("up.weight", "down.weight")
    ]


def test_many_later_tensors_are_one_line() -> None:
    text = shown(report(case(tensor("output"), *epochs(20))))
    assert "recorded after each of 20 epochs (40 tensors): the same at every degree" in text
    assert "epoch 1: up.weight" not in text
    assert row(text, "output")


def test_a_later_tensor_that_differs_is_shown() -> None:
    text = shown(report(case(tensor("output"), *epochs(20, bad=7))))
    assert "2 differ, the first is epoch 7: up.weight" in " ".join(text.split())
    assert "epoch 7: up.weight" in text
    assert "epoch 6: up.weight" not in text


def test_few_later_tensors_are_rows() -> None:
    text = shown(report(case(tensor("output"), *epochs(2))), width=120)
    assert "epoch 2: down.weight" in text
    assert "after each of" not in text


def test_summary_has_one_row_for_each_case() -> None:
    bad = case(tensor("y", "a", "b", "c"), name="ffn")
    text = shown(report(case(tensor("output")), bad))
    summary = text[text.index("case ") :]
    assert row(summary, "linear-row") == [
        "linear-row", "1,", "2,", "3", "yes", "yes", "yes", "1", "of", "1", "1.23",
    ]  # fmt: skip
    assert row(summary, "ffn")[4] == "NO"


def test_verdict_is_the_last_line_and_whole() -> None:
    verdict = "Proved for 1 case with 1 tensor: " + "every tensor has the same bits " * 5
    text = shown(report(case(tensor("output"))), verdict=verdict)
    assert text.splitlines()[-1] == verdict


def test_skipped_cases_are_named_with_their_way_in() -> None:
    text = shown(report(case(tensor("y")), skipped=[{"name": "digits", "extra": "demo"}]))
    line = "skipped: digits (needs the extra 'demo'); pip install 'shardproof[demo]'"
    assert line in text.splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_width_in_plain_ascii(width: int) -> None:
    long = tensor("model.layers.0.feed_forward.down_proj.weight (initial)", "a", "b", "c")
    text = shown(report(case(tensor("weight.grad"), long, *epochs(20))), width=width)
    lines = text.splitlines()[:-2]  # the contract and the verdict stay whole
    assert max(map(len, lines)) <= width
    assert text.isascii()
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in lines)


def test_colour_is_for_terminals() -> None:
    file = io.StringIO()
    out = PlainConsole(file=file, width=120, force_terminal=True, color_system="standard")
    show_report(report(case(tensor("y", "a", "b"))), "Not proved.", out)
    assert "\x1b[1;31mNO: 2" in file.getvalue()


def test_cases_are_listed_with_what_they_need() -> None:
    file = io.StringIO()
    cases = [
        {"name": "ffn", "description": "h to 4h", "source": "001_154408528b93d477.txt",
         "extra": "", "installed": True},
        {"name": "digits", "description": "real input", "source": "", "extra": "demo",
         "installed": False},
    ]  # fmt: skip
    show_cases(cases, PlainConsole(file=file, width=120))
    assert row(file.getvalue(), "ffn") == ["ffn", "h", "to", "4h", "001_154408528b93d477.txt", "-"]
    assert row(file.getvalue(), "digits")[-4:] == ["-", "demo,", "not", "installed"]


def test_units() -> None:
    assert [size(0), size(1023), size(1024), size(77824)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "76.0 KiB",
    ]
    assert [size(5 << 30), size(3 << 40)] == ["5.0 GiB", "3.0 TiB"]
    assert [small(1.25e-12), small(30.0), small("nan")] == ["1.2e-12", "3.0e+1", "nan"]
    assert [shape([2, 3]), shape([])] == ["2x3", "scalar"]
    assert [listed([]), listed([1, 2])] == ["", "1 and 2"]
