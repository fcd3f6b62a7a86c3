"""Rotary embeddings that change themselves: no call, no row and no thread sees another one's frequencies."""

import copy
import pickle
import threading

import pytest
import torch
from tiny_models import STRETCHED, needs_pickle, stretched_model
from transformers.modeling_rope_utils import dynamic_rope_update

from qllm_ops import PriorityFlag
from qllm_ops.models import install, make_preset, uninstall
from qllm_ops.models.rotary import OwnPositions, Row, isolate, positions_of, restore

WAIT_S = 20
SHORT, LONG = (torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 90))


@torch.inference_mode()
def logits(model, ids):
    return model(ids).logits


def rotary_of(model):
    found = model.model.rotary_emb
    return found.rotary if isinstance(found, OwnPositions) else found


def meet_in_the_window(model, monkeypatch):
    """Between the choice of the frequencies and their use, threads wait for each other from now on."""
    cls = type(rotary_of(model))
    use = cls.forward
    while hasattr(use, "__wrapped__"):
        use = use.__wrapped__
    barrier = threading.Barrier(2)

    @dynamic_rope_update
    def forward(self, x, position_ids):
        barrier.wait(WAIT_S)
        return use(self, x, position_ids)

    monkeypatch.setattr(cls, "forward", forward)


def both_at_once(model):
    """The logits of SHORT and of LONG, computed by two threads."""
    results = {}

    def run(ids):
        results[ids.shape[1]] = logits(model, ids)

    threads = [threading.Thread(target=run, args=(ids,), daemon=True) for ids in (SHORT, LONG)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [results[ids.shape[1]] for ids in (SHORT, LONG)]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_two_threads_on_one_model(kind, monkeypatch):
    model = stretched_model(kind)
    install(model)
    alone = [logits(model, ids) for ids in (SHORT, LONG)]
    meet_in_the_window(model, monkeypatch)
    assert all(map(torch.equal, both_at_once(model), alone))
    # Without us it happens: this is what the test is there for.
    restore(model)
    assert not all(map(torch.equal, both_at_once(model), alone))


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_call_gives_what_a_new_model_gives(kind):
    """Bit for bit, whatever the model ran before."""
    new = {ids.shape[1]: logits(stretched_model(kind), ids) for ids in (SHORT, LONG, LONG[:, :50])}
    model = stretched_model(kind)
    assert not torch.equal(rotary_in(model, 0, 20), rotary_in(model, 0, 90)[:, :20]), "too short to show"
    logits(model, LONG)
    isolate(model)
    for ids in (LONG, LONG[:, :50], SHORT, LONG):
        assert torch.equal(logits(model, ids), new[ids.shape[1]])


def rotary_in(model, start, stop):
    cos, _ = model.model.rotary_emb(torch.zeros(1), torch.arange(start, stop)[None])
    return cos


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_row_depends_on_its_own_reach_only(kind):
    model = stretched_model(kind)
    assert isolate(model) == ["model.rotary_emb"]
    whole = {reach: rotary_in(model, 0, reach) for reach in (20, 60, 90)}
    # The end of 60 tokens, the start of 20, and the middle of what will be 90.
    parts = [(50, 60, 60), (0, 12, 20), (5, 6, 90)]
    positions = torch.cat([torch.arange(start, stop) for start, stop, _ in parts])[None]
    begins = (0, 10, 22)
    rows = [Row(at, stop - start, reach) for at, (start, stop, reach) in zip(begins, parts, strict=True)]
    with positions_of(rows):
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
        assert cos.shape == sin.shape == (1, 23, 16)
        for row, (start, stop, reach) in zip(rows, parts, strict=True):
            assert torch.equal(cos[:, row.start :][:, : row.length], whole[reach][:, start:stop])
        with pytest.raises(ValueError, match="was given 4 positions for rows of 23"):
            rotary_in(model, 0, 4)


def test_other_models_and_an_uninstalled_one_are_as_they_were():
    model = make_preset("tiny")
    before = model.model.rotary_emb
    assert isolate(model) == []
    assert model.model.rotary_emb is before
    model = stretched_model("longrope")
    before = model.model.rotary_emb
    keys = list(model.state_dict())
    install(model)
    install(model, PriorityFlag())
    assert model.model.rotary_emb.rotary is before
    assert list(model.state_dict()) == keys
    uninstall(model)
    assert model.model.rotary_emb is before


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle", marks=needs_pickle),
    ],
)
def test_a_copy_has_a_rotary_embedding_of_its_own(again):
    model = stretched_model("longrope")
    install(model)
    twin = again(model)
    assert rotary_of(twin) is not rotary_of(model)
    assert torch.equal(logits(twin, LONG), logits(model, LONG))


def test_compiled_it_is_still_one_graph():
    torch.compiler.reset()
    model = stretched_model("longrope")
    try:
        logits(torch.compile(model, fullgraph=True, backend="aot_eager"), SHORT)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"without us it is not one in this transformers: {str(error).splitlines()[0]}")
    install(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (SHORT, LONG):
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=0, atol=1e-5)
