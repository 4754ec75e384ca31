"""What a model of transformers is called with, where ranks differ in it."""

import pytest
import torch

from agreeing import check_all_said, said
from hf_zoo import Setting, cut_model
from places import Pool
from shardproof.axis import Axis

pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 11, 3, 8, 1], [7, 7, 2, 60, 4, 4]])


def options(name: str, rank: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(IDS)
    places = torch.arange(6)[None].expand(2, 6).clone()
    labels = IDS.clone()
    {"attention_mask": mask, "position_ids": places, "labels": labels}[name][1, 0] -= rank
    return {"attention_mask": mask, "position_ids": places, "labels": labels}


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "labels"])
@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_masks_positions_and_labels_that_differ_are_named(
    pool: Pool, engine: str, name: str
) -> None:
    def work(axis: Axis) -> str:
        model = cut_model(axis, Setting("llama"))
        return said(lambda: model(IDS, **options(name, axis.rank)))

    messages = pool(2, engine).run(work)
    check_all_said(messages, f"the {name} of 'Llama", "int64 (2, 6), rank 0 has ", "at [1, 0]")


def test_ids_given_by_place_are_named_too(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        return said(lambda: cut_model(axis, Setting("llama"))(IDS + axis.rank % 2))

    check_all_said(pool(3, "threads").run(work), "the input_ids of 'Llama", "what rank 0 has")


def test_equal_calls_with_a_cache_raise_nothing(pool: Pool) -> None:
    def work(axis: Axis) -> int:
        model = cut_model(axis, Setting("llama")).eval()
        with torch.no_grad():
            found = model(IDS, attention_mask=torch.ones_like(IDS), use_cache=True)
            cache = found.past_key_values
            for _ in range(3):
                found = model(found.logits[:, -1:].argmax(-1), past_key_values=cache)
        return int(cache.get_seq_length())

    assert pool(3, "threads").run(work) == [9] * 3


def test_a_loop_that_samples_apart_is_noticed(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = cut_model(axis, Setting("llama")).eval()
        generator = torch.Generator().manual_seed(axis.rank)

        def sample() -> None:
            ids = IDS
            for _ in range(10):
                last = model(ids).logits[:, -1].softmax(-1)
                ids = torch.cat((ids, torch.multinomial(last, 1, generator=generator)), 1)

        with torch.no_grad():
            return said(sample)

    check_all_said(pool(2, "processes").run(work), "the input_ids of 'Llama")
