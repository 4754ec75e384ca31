import copy
import dataclasses
import json

import pytest

from shardproof.errors import UsageError
from shardproof.prover import compare_with, prove_cases
from shardproof.prover.case import Check
from shardproof.prover.case_report import (
    Agreement,
    CaseReport,
    Errors,
    MemoryReport,
    TensorReport,
)
from shardproof.prover.cases import find_case
from shardproof.prover.compare_reports import ONLY_EARLIER, ONLY_HERE, OTHER_BITS, TensorDifference
from shardproof.prover.judge import join_checks
from shardproof.prover.report import Report
from shardproof.scheme import Scheme

A, B = "a" * 64, "b" * 64


def tensor(name="w", sha256=None, **changes):
    sha256 = {"1": A, "2": A, "3": A} if sha256 is None else sha256
    made = TensorReport(
        name,
        (2, 3),
        "float32",
        sha256,
        len(set(sha256.values())) == 1,
        True,
        Agreement(False, True, 1e-5, 1e-6, 4.1e-8, 3),
        Errors(2.1e-8, 2.3e-8),
    )
    return dataclasses.replace(made, **changes)


def disagreeing(name):
    return tensor(name, torch=Agreement(False, False, 1e-5, 1e-6, 0.5, 9))


def case(*tensors, name="ffn", memory=None, checks=()):
    memory = {"2": (MemoryReport(0, 8, (2,), 8),)} if memory is None else memory
    return CaseReport(
        name, "source.txt", "shows", (1, 2, 3), 1.2, tensors or (tensor(),), memory, {}, checks
    )


def report(*cases, **changes):
    made = Report(
        cases or (case(),), (1, 2, 3), "threads", "threads", "invariant", 8, 12345, "tree-3"
    )
    return dataclasses.replace(made, **changes)


# The document


@pytest.fixture(scope="module")
def document():
    made = prove_cases([find_case("linear-row"), find_case("ffn")], degrees=(1, 2, 3), threads=1)
    return json.loads(json.dumps(made.as_dict(), allow_nan=False))


def test_the_document_has_the_promised_keys(document):
    assert {
        "proved", "identical", "agrees_with_torch", "numerics", "engine", "transport", "leaves",
        "contract", "skipped", "cases",
    } <= document.keys()  # fmt: skip
    assert document["proved"] is True
    assert document["identical"] is True
    assert document["agrees_with_torch"] is True
    assert (document["numerics"], document["engine"]) == ("invariant", "threads")
    assert (document["transport"], document["leaves"]) == ("threads", 8)
    assert document["contract"].startswith("tree-3 leaves=8 ")
    assert document["skipped"] == []


def test_a_case_in_the_document_has_the_promised_keys(document):
    row = document["cases"][0]
    assert row["name"] == "linear-row"
    assert row["source"] == "002_bff0c980e9c9c989.txt"
    assert row["degrees"] == [1, 2, 3]
    assert row["proved"] is row["identical"] is True
    assert isinstance(row["seconds"], float)
    assert row["memory"]["2"][0] == {
        "rank": 0,
        "largest_bytes": 1245184,
        "largest_shape": [608, 512],
        "bound_bytes": 1245184,
    }
    forward = row["comm"]["2"]["forward"]["all_reduce"]
    assert forward == {"calls": 1, "message_bytes": 77824, "sent_bytes": 77824}
    assert row["comm"]["1"] == {"forward": {}, "backward": {}}
    assert set(row["comm"]["2"]) == {"forward", "backward"}  # not the prover's own gathers
    assert row["first_difference"] is None


def test_a_tensor_in_the_document_has_the_promised_keys(document):
    tensors = {each["name"]: each for each in document["cases"][0]["tensors"]}
    gradient = tensors["weight.grad"]
    assert gradient["shape"] == [608, 1024]
    assert set(gradient["sha256"]) == {"1", "2", "3"}
    assert all(len(value) == 64 for value in gradient["sha256"].values())
    assert gradient["identical"] is True
    assert gradient["agreement_judged"] is True
    assert set(gradient["torch"]) == {
        "exact", "allclose", "rtol", "atol", "max_abs_diff", "max_ulp"
    }  # fmt: skip
    assert (gradient["torch"]["rtol"], gradient["torch"]["atol"]) == (1e-5, 1e-6)
    assert isinstance(gradient["torch"]["max_ulp"], int)
    assert set(gradient["fp64"]) == {"ours", "torch"}
    assert 0 < gradient["fp64"]["ours"] < 1e-6
    assert gradient["seed_allclose"] is True
    assert tensors["output"]["seed_allclose"] is None


def test_checks_are_in_the_document(document):
    checks = document["cases"][1]["checks"]
    assert [check["name"] for check in checks] == [
        "one all-reduce forward",
        "one all-reduce backward",
    ]
    assert all(check["passed"] is True for check in checks)


# Logic


def test_proved_takes_all_four():
    assert report().proved
    assert not report(case(tensor(sha256={"1": A, "2": B}))).proved
    assert not report(case(disagreeing("w"))).proved
    assert not report(case(memory={"2": (MemoryReport(0, 9, (2,), 8),)})).proved
    assert not report(case(checks=(Check("claim", False, "no"),))).proved


def test_one_bad_case_spoils_the_report():
    bad = case(tensor(sha256={"1": A, "2": B}), name="bad")
    assert not report(case(), bad).identical
    assert report(case(), bad).agrees_with_torch


def test_what_is_not_judged_need_not_agree():
    late = tensor("step 2: w", agreement_judged=False, torch=None, fp64=None)
    assert report(case(late)).proved
    assert not report(case(dataclasses.replace(late, agreement_judged=True))).proved


def test_the_seeds_own_tolerance_counts():
    assert not report(case(tensor(seed_allclose=False))).agrees_with_torch
    assert report(case(tensor(seed_allclose=True))).agrees_with_torch


def test_memory_counts_from_degree_two():
    over = (MemoryReport(0, 9, (2,), 8),)
    assert case(memory={"1": over}).within_memory_bound
    assert not case(memory={"1": over, "2": over}).within_memory_bound


# Sentences


def test_the_verdict_of_a_proof():
    assert report().verdict() == (
        "Proved for 1 case with 1 tensor: every tensor has the same bits at degrees 1, 2 and 3, "
        "agrees with plain PyTorch and no rank exceeds its memory bound."
    )


def test_the_verdict_says_when_nothing_was_compared():
    assert "with one degree nothing was compared" in report(degrees=(2,)).verdict()


def test_the_verdict_names_case_tensor_and_degrees():
    tensors = tensor("first"), tensor("second", {"1": A, "2": A, "3": B}), disagreeing("third")
    assert report(case(), case(*tensors, name="bad")).verdict() == (
        "Not proved: in case bad, tensor second is the first whose bits differ: degree 3 differs "
        "from degree 1; tensor third is the first that does not agree with plain PyTorch: the "
        "largest difference is 0.5 (rtol 1e-05, atol 1e-06)."
    )


def test_the_verdict_of_a_disagreement():
    assert report(case(tensor(), disagreeing("y"))).verdict() == (
        "Not proved: in case ffn, tensor y is the first that does not agree with plain PyTorch: "
        "the largest difference is 0.5 (rtol 1e-05, atol 1e-06)."
    )
    nan = tensor("y", torch=Agreement(False, False, 1e-5, 1e-6, None, None))
    assert "NaN or Inf stand in other places" in report(case(nan)).verdict()
    strict = tensor("y", seed_allclose=False)
    assert "element by element" in report(case(strict)).verdict()


def test_the_verdict_of_a_memory_fault_and_of_a_check():
    over = case(memory={"3": (MemoryReport(2, 9, (3, 3), 8),)})
    assert (
        "rank 2 of 3 allocated 9 bytes for a tensor of shape [3, 3], more than its bound of 8"
        in (report(over).verdict())
    )
    failed = case(checks=(Check("right", True, ""), Check("claim", False, "why")))
    assert "the check 'claim' failed (why)" in report(failed).verdict()


def test_the_first_difference_is_in_execution_order():
    tensors = disagreeing("a"), tensor("b", {"1": A, "2": B}), tensor("c", {"1": B, "2": A})
    assert case(*tensors).first_difference() == {
        "tensor": "b", "what": "bits", "degrees": [1, 2], "detail": ""
    }  # fmt: skip
    assert case(tensors[0]).first_difference()["what"] == "torch"
    assert case().first_difference() is None


# Against an earlier report

OTHER_W = TensorDifference("ffn", "w", OTHER_BITS)


def test_equal_reports_are_the_same():
    found = compare_with(report(), report().as_dict())
    assert found.is_same
    assert found.compared == 1


def test_other_degrees_are_compared_with_each_other():
    earlier = report(case(tensor(sha256={"4": A}))).as_dict()
    assert compare_with(report(), earlier).is_same
    earlier = report(case(tensor(sha256={"4": B}))).as_dict()
    assert compare_with(report(), earlier).differences == (OTHER_W,)


def test_only_cases_that_both_have_are_compared():
    earlier = report(case(), case(tensor("other"), name="more")).as_dict()
    found = compare_with(report(case(tensor("new"), name="less"), case()), earlier)
    assert found.is_same
    assert found.compared == 1


def test_a_tensor_that_one_report_lacks_is_a_difference():
    earlier = report(case(tensor("other"), tensor())).as_dict()
    found = compare_with(report(case(tensor(), tensor("new"))), earlier)
    assert found.differences == (
        TensorDifference("ffn", "new", ONLY_HERE),
        TensorDifference("ffn", "other", ONLY_EARLIER),
    )
    assert found.compared == 3


def test_a_native_tensor_that_one_report_lacks_at_a_common_degree_is_a_difference():
    both = tensor("v", {"1": A, "2": B})
    mine = report(case(both, tensor(sha256={"1": A, "2": B})), numerics="native")
    earlier = report(case(both, tensor(sha256={"2": B})), numerics="native").as_dict()
    assert compare_with(mine, earlier).differences == (OTHER_W,)
    earlier = report(case(both, tensor(sha256={"3": B})), numerics="native").as_dict()
    assert compare_with(mine, earlier).differences == (TensorDifference("ffn", "w", ONLY_HERE),)


def test_native_reports_are_compared_degree_by_degree():
    mine = report(case(tensor(sha256={"1": A, "2": B})), numerics="native")
    same = report(case(tensor(sha256={"2": B, "3": A})), numerics="native").as_dict()
    assert compare_with(mine, same).is_same
    other = report(case(tensor(sha256={"2": A})), numerics="native").as_dict()
    assert compare_with(mine, other).differences == (OTHER_W,)
    alone = report(case(tensor(sha256={"8": A})), numerics="native").as_dict()
    with pytest.raises(UsageError, match="at a degree that both have"):
        compare_with(mine, alone)


def test_nothing_in_common_is_an_error():
    with pytest.raises(UsageError, match=r"nothing in common.*the cases other, this one has ffn"):
        compare_with(report(), report(case(name="other")).as_dict())


@pytest.mark.parametrize(
    ("key", "value"), [("contract", "tree-0"), ("seed", 1), ("numerics", "native")]
)
def test_another_contract_is_an_error(key, value):
    with pytest.raises(UsageError, match=f"its {key} is .* the bits depend on it"):
        compare_with(report(), report().as_dict() | {key: value})


def test_a_changed_hash_in_a_file_is_found(document):
    assert compare_with(document, document).is_same
    changed = copy.deepcopy(document)
    changed["cases"][1]["tensors"][3]["sha256"]["2"] = B
    name = changed["cases"][1]["tensors"][3]["name"]
    assert compare_with(document, changed).differences == (
        TensorDifference("ffn", name, OTHER_BITS),
    )


def test_another_seed_gives_other_hashes():
    mine, other = (
        prove_cases([find_case("ffn")], degrees=(1,), threads=1, seed=seed).as_dict()
        for seed in (12345, 1)
    )
    other["seed"] = mine["seed"]
    assert len(compare_with(mine, other).differences) == len(mine["cases"][0]["tensors"])


def test_other_leaves_are_another_contract():
    first = prove_cases([find_case("ffn")], degrees=(1,), threads=1)
    second = prove_cases([find_case("ffn")], degrees=(1,), threads=1, scheme=Scheme(leaves=4))
    with pytest.raises(UsageError, match="its contract is 'tree-3 leaves=8"):
        compare_with(second, first.as_dict())


def test_one_of_anything_is_written_as_one():
    alone = dataclasses.replace(case(), degrees=(2,))
    assert str(report(alone)).splitlines()[0].endswith("proved, 1 tensor, degree 2")
    assert join_checks("claim", [(2, Check("claim", True, "holds"))]).detail == "holds (degree 2)"
    made = [(degree, Check("claim", True, "holds")) for degree in (1, 2)]
    assert join_checks("claim", made).detail == "holds (degrees 1, 2)"


def test_a_report_prints_a_line_for_each_case_and_for_what_is_wrong():
    tensors = tensor("first"), tensor("second", {"1": A, "2": A, "3": B}), disagreeing("third")
    lines = str(report(case(), case(*tensors, name="bad"))).splitlines()

    assert lines[0].endswith("proved, 1 tensor, degrees 1, 2, 3")
    assert lines[1] == "bad: NOT PROVED, 3 tensors, degrees 1, 2, 3"
    assert (
        lines[2]
        == "  second: the bits differ (degree and hash: 1 aaaaaaaa, 2 aaaaaaaa, 3 bbbbbbbb)"
    )
    assert lines[3] == "  third: does not agree with plain PyTorch (largest difference 0.5)"
    assert lines[-1].startswith("Not proved: in case bad, tensor second")
    assert repr(report(case())).startswith("<Report: Proved for 1 case")


def test_a_report_says_when_creation_was_not_audited():
    whole, partial = report(case()), report(case(), audits_creation=False)

    assert "covers creation, forward" in whole.as_dict()["notes"][1]
    assert "covers forward, backward" in partial.as_dict()["notes"][1]
    assert partial.verdict() == (
        f"{whole.verdict()} The memory audit leaves creation out, as requested."
    )
