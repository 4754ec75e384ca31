"""Tensors whose memory C cannot read are handled, or refused in Python with a way out."""

import json
import re

import pytest

import unreadable
from fresh_process import run_fresh


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What every case did, each in a fork of one fresh process."""
    last = run_fresh("import unreadable; unreadable.main()").strip().splitlines()[-1]
    found: dict[str, str] = json.loads(last)
    return found


@pytest.mark.parametrize("name", unreadable.CASES)
def test_what_c_cannot_read_is_handled_or_refused(outcomes: dict[str, str], name: str) -> None:
    wanted, _ = unreadable.CASES[name]
    assert re.search(wanted, outcomes[name], re.DOTALL), f"{outcomes[name]!r} is not {wanted!r}"
