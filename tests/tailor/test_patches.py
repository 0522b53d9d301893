"""Patches go both ways bit for bit."""

from __future__ import annotations

import pytest
import torch

from tailor.errors import CheckpointError, PatchError
from tailor.patch import Patch, decode_gaps, encode_gaps

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


def test_an_empty_patch_is_a_patch(tmp_path):
    Patch.between({"w": torch.ones(2)}, {"w": torch.ones(2)}).save(tmp_path / "patch")
    assert dict(Patch.load(tmp_path / "patch").apply_to({})) == {}


def test_views_and_transposes(pair):
    base = {"w": torch.arange(12.0).view(3, 4).T}
    fused = {"w": base["w"].clone()}
    fused["w"][1, 2] = -1
    assert torch.equal(dict(Patch.between(base, fused).apply_to(base))["w"], fused["w"])
