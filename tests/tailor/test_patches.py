"""Patches go both ways bit for bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tailor.errors import CheckpointError, PatchError
from tailor.patch import Patch, decode_gaps, encode_gaps
from tailor.storage import TensorFile, save_tensors

INTEGER_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def random_bits(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit patterns but NaN, which is unequal to itself: zeros of both signs, subnormals, infinities."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGER_OF[dtype])
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64)
    tensor = bits.to(INTEGER_OF[dtype]).view(dtype)
    return torch.where(tensor.isnan(), torch.tensor(0.5, dtype=dtype), tensor)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = INTEGER_OF[a.dtype]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


@pytest.fixture
def pair():
    base, fused = {}, {}
    for seed, dtype in enumerate(INTEGER_OF):
        for shape in ((40, 50), (3,), (1, 1)):
            name = f"{dtype}{shape}"
            base[name] = random_bits(seed, shape, dtype)
            chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1
            chosen.reshape(-1)[0] = True
            fused[name] = torch.where(chosen, random_bits(seed + 99, shape, dtype), base[name])
    base["untouched"] = fused["untouched"] = torch.randn(4)
    return base, fused


def test_round_trip_through_a_file(tmp_path, pair):
    base, fused = pair
    patch = Patch.between(base, fused, {"base": "toy", "method": "Tailor", "settings": {"sparsity": 0.1}})
    patch.save(tmp_path / "patch.safetensors")
    loaded = Patch.load(tmp_path / "patch.safetensors")
    assert loaded.header == {"base": "toy", "method": "Tailor", "settings": {"sparsity": 0.1}}
    assert "untouched" not in loaded.tensors and loaded.changed_count == patch.changed_count > 0
    there = dict(loaded.apply_to(base))
    assert set(there) == set(base) - {"untouched"}
    assert all(same_bits(tensor, fused[name]) for name, tensor in there.items())
    back = dict(loaded.remove_from(fused))
    assert all(same_bits(tensor, base[name]) for name, tensor in back.items())


def test_inputs_stay_as_they_are(pair):
    base, fused = pair
    copy = {name: tensor.clone() for name, tensor in base.items()}
    patch = Patch.between(base, fused)
    for _, tensor in patch.apply_to(base):
        tensor.fill_(1)
    assert all(same_bits(base[name], copy[name]) for name in copy)


def test_equal_patches_are_equal_bytes(tmp_path, pair):
    base, fused = pair
    Patch.between(base, fused, {"b": 1, "a": 2}).save(tmp_path / "one")
    reordered = ((name, fused[name]) for name in reversed(list(fused)))
    Patch.between(base, reordered, {"a": 2, "b": 1}).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    "indices",
    [[], [0], [254], [255], [256], [0, 1, 2], [0, 255, 511], [254, 509, 1275], [509, 510, 765, 766], [3, 100_000]],
)
def test_gaps(indices):
    flat = torch.tensor(indices, dtype=torch.int64)
    code = encode_gaps(flat)
    assert code.dtype == torch.uint8 and torch.equal(decode_gaps(code), flat)


def test_gaps_by_hand():
    assert encode_gaps(torch.tensor([0, 1, 5])).tolist() == [0, 0, 3]
    assert encode_gaps(torch.tensor([254, 510])).tolist() == [254, 255, 0]
    torch.manual_seed(0)
    flat = (torch.rand(200_000) < 0.003).nonzero()[:, 0]
    assert int(flat.diff().max()) > 255 and torch.equal(decode_gaps(encode_gaps(flat)), flat)


def test_sign_of_zero_is_a_change():
    patch = Patch.between({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])})
    assert patch.changed_count == 1
    assert torch.signbit(dict(patch.apply_to({"w": torch.tensor([0.0])}))["w"])


def test_wrong_weights_are_refused_before_anything_is_yielded(pair):
    base, fused = pair
    patch = Patch.between(base, fused, {"base": "toy"})
    last = list(patch.tensors)[-1]
    with pytest.raises(PatchError, match=r"applied here already"):
        patch.apply_to(fused)
    with pytest.raises(PatchError, match=r"not applied here"):
        patch.remove_from(base)
    other = {**base, last: torch.ones_like(base[last]) * 3}
    with pytest.raises(PatchError, match=r"differ from the patch's base \(toy\) at the patched places"):
        patch.apply_to(other)
    with pytest.raises(PatchError, match="the weights lack it"):
        patch.apply_to({name: tensor for name, tensor in base.items() if name != last})
    with pytest.raises(PatchError, match="load them as such"):
        patch.apply_to({**base, last: base[last].double()})


def test_patches_of_disjoint_places_stack():
    base = {"w": torch.arange(6.0)}
    first = {"w": torch.tensor([9.0, 1, 2, 3, 4, 5])}
    second = {"w": torch.tensor([0.0, 1, 2, 3, 4, 7])}
    one, two = Patch.between(base, first), Patch.between(base, second)
    assert one.unlike(base) == () and one.unlike(second) == ("w",)
    stacked = dict(two.apply_to(dict(one.apply_to(base))))
    assert torch.equal(stacked["w"], torch.tensor([9.0, 1, 2, 3, 4, 7]))
    assert torch.equal(dict(one.remove_from(stacked))["w"], second["w"])


def test_what_cannot_be_a_patch(tmp_path):
    with pytest.raises(PatchError, match="x: not among the base's tensors"):
        Patch.between({"w": torch.ones(2)}, {"x": torch.ones(2)})
    with pytest.raises(PatchError, match=r"base is float32 \(2,\), fused is float16 \(2,\)"):
        Patch.between({"w": torch.ones(2)}, {"w": torch.ones(2).half()})
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Patch.load(tmp_path / "missing")
    path = tmp_path / "patch"
    Patch.between({"w": torch.ones(2)}, {"w": torch.zeros(2)}).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Patch.load(path)


Changes = Callable[[dict[str, torch.Tensor], dict], object]
DAMAGE: dict[str, tuple[Changes, str]] = {
    "a place beyond the end": (lambda t, h: t["gaps/w"].__setitem__(-1, 200), "do not fit its shape or dtype"),
    "a change too few": (lambda t, h: t.update({"xors/w": t["xors/w"][1:].clone()}), "do not fit"),
    "a gap too few": (lambda t, h: t.update({"gaps/w": t["gaps/w"][1:].clone()}), "do not fit"),
    "a gap that does not end": (
        lambda t, h: t.update({"gaps/w": torch.cat([t["gaps/w"], torch.tensor([255], dtype=torch.uint8)])}),
        "do not fit",
    ),
    "gaps of another kind": (lambda t, h: t.update({"gaps/w": t["gaps/w"].int()}), "do not fit"),
    "xors of another kind": (lambda t, h: t.update({"xors/w": t["xors/w"].short()}), "do not fit"),
    "xors of two dimensions": (lambda t, h: t.update({"xors/w": t["xors/w"][None]}), "do not fit"),
    "another shape": (lambda t, h: h["tensors"]["w"].update(shape=[2, 2]), "do not fit"),
    "a dtype that is none": (lambda t, h: h["tensors"]["w"].update(dtype="nn"), "do not fit"),
    "no shape": (lambda t, h: h["tensors"]["w"].pop("shape"), "incomplete"),
    "no header": (lambda t, h: h.pop("header"), "incomplete"),
    "no gaps": (lambda t, h: t.pop("gaps/w"), "incomplete"),
    "tensors that are a list": (lambda t, h: h.update(tensors=["w"]), "incomplete"),
    "another format": (lambda t, h: h.update(format=2), "not a patch of format 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_seen_at_loading(tmp_path, case):
    base, fused = {"w": torch.zeros(30)}, {"w": torch.zeros(30)}
    fused["w"][[2, 7, 29]] = 1.0
    path = tmp_path / "patch"
    Patch.between(base, fused).save(path)
    tensors, header = load_file(path), TensorFile(path).header()
    change, message = DAMAGE[case]
    change(tensors, header)
    save_tensors(path, tensors, header)
    with pytest.raises(PatchError, match=message):
        Patch.load(path)


def test_other_bits_than_recorded_are_refused_when_they_are_made(tmp_path, pair):
    base, fused = pair
    patch = Patch.between(base, fused)
    name = next(iter(patch.tensors))
    wrong = dataclasses.replace(patch.tensors[name], xors=patch.tensors[name].xors ^ 1)
    damaged = Patch({**patch.tensors, name: wrong}, {})
    with pytest.raises(PatchError, match=f"{re.escape(name)}: the patch does not lead to the entries"):
        dict(damaged.apply_to(base))
    with pytest.raises(PatchError, match="does not lead to"):
        dict(damaged.remove_from(fused))


def test_views_stack_and_unstack(pair):
    base, fused = pair
    last = {name: torch.where(tensor == 0.5, tensor, -tensor) for name, tensor in fused.items()}
    one, two = Patch.between(base, fused), Patch.between(fused, last)
    there = two.applied(one.applied(base))
    assert list(there) == list(base) and len(there) == len(base) and "untouched" in there
    assert all(same_bits(there[name], last[name]) for name in base)
    back = one.removed(two.removed(there))
    assert all(same_bits(back[name], base[name]) for name in base)
    with pytest.raises(PatchError, match="differ from the patch's base"):
        two.applied(base)
    with pytest.raises(PatchError, match="differ from the patch's base"):
        one.removed(there)


def test_a_tenth_of_a_bfloat16_model_takes_fifteen_percent_of_its_bytes(tmp_path):
    base = {"w": random_bits(0, (1000, 1000), torch.bfloat16)}
    chosen = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(1)) < 0.1
    fused = {"w": torch.where(chosen, random_bits(2, (1000, 1000), torch.bfloat16), base["w"])}
    Patch.between(base, fused).save(tmp_path / "patch")
    # 2 bytes of bits and 1 for the gap, of 2 bytes each: 0.1 * 3 / 2.
    assert (tmp_path / "patch").stat().st_size / base["w"].nbytes == pytest.approx(0.15, abs=0.002)


def test_an_empty_patch_is_a_patch(tmp_path):
    Patch.between({"w": torch.ones(2)}, {"w": torch.ones(2)}).save(tmp_path / "patch")
    assert dict(Patch.load(tmp_path / "patch").apply_to({})) == {}


def test_views_and_transposes(pair):
    base = {"w": torch.arange(12.0).view(3, 4).T}
    fused = {"w": base["w"].clone()}
    fused["w"][1, 2] = -1
    assert torch.equal(dict(Patch.between(base, fused).apply_to(base))["w"], fused["w"])
