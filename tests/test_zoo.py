"""The whole zoo, slow part: run it with `pytest -m zoo`. What the quick part covers is in test_anatomy.py."""

from __future__ import annotations

import pytest

from resect.anatomy import dissect
from resect.anatomy.checking import difference, half, outputs
from resect.anatomy.slicing import apply, masked_weights, skeleton
from resect.anatomy.slicing import replace as put
from zoo import WHOLE, ZOO

pytestmark = pytest.mark.zoo
TOLERANCE = 1e-4

# families whose attention must be prunable, and the number of groups of heads to be found
HEADS = {
    "bert": 2,
    "roberta": 2,
    "gpt2": 2,
    "llama": 2,
    "mixtral": 2,
    "phi3": 2,
    "falcon": 2,
    "gemma": 2,
    "t5": 3,
    "vit": 2,
    "swin": 4,
    "sam": 2,
    "whisper": 6,
    "attention_one_key": 2,
    "attention_fused_split": 2,
    "attention_einsum": 2,
}


@pytest.fixture(autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    if "zoo" not in str(request.config.getoption("markexpr")):
        pytest.skip("the whole zoo takes minutes; pytest -m zoo runs it")


@pytest.mark.parametrize("name", sorted(set(WHOLE) - set(ZOO)))
def test_cut_equals_masked(name: str) -> None:
    model, example = WHOLE[name]()
    anatomy = dissect(model, example)
    hidden = [g for g in anatomy.groups if g.kind != "stream"]
    plans = [{g.name: half(g, 1)} for g in hidden] + [{g.name: half(g, seed) for g in hidden} for seed in (2, 3)]
    for keep in plans:
        masked = skeleton(model)
        put(masked, anatomy, masked_weights(model, anatomy, keep))
        small = apply(skeleton(model), anatomy, keep)
        assert difference(outputs(small, anatomy.example), outputs(masked, anatomy.example)) <= TOLERANCE, list(keep)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads_are_found(name: str) -> None:
    anatomy = dissect(*WHOLE[name]())
    assert sum(g.kind == "head" for g in anatomy.groups) == HEADS[name]
