"""init_from: every tensor is accounted for, a head is carried over by class name, and nothing else is ever taken for weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aplantida_dist.ancestor import Ancestor, InitError, open_ancestor
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.errors import UserError
from aplantida_dist.init_from import begin_with
from aplantida_dist.lineage import Descent, Lineage
from aplantida_dist.model import build_model, head_names
from aplantida_dist.origin import NO_IDENTITIES
from tests.pictures import build, fill
from tests.ranks import command_on_ranks
from tests.runs import cut_back, rows_of, write_config
from tests.test_bad_input import train_complaint

GLOBAL = ("Acer", "Betula", "Cornus", "Daphne", "Euonymus")
REGIONAL = ("Quercus", "Euonymus", "Betula", "Rosa", "Acer")
"""As many classes: three are shared, none at its old place but Betula's by a new way, two are new, two are gone."""


def make(name: str, classes: Sequence[str], *, seed: int, image_size: int = 32) -> nn.Module:
    return build_model(name, num_classes=len(classes), image_size=image_size, pretrained=False, kwargs={}, seed=seed)


def ancestor_of(model: nn.Module, classes: Sequence[str] | None) -> Ancestor:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    class_map = None if classes is None else ClassMap(tuple(classes))
    return Ancestor(
        Descent("runs/global/checkpoints/step_00000001", "ab" * 32), state, class_map, Lineage(NO_IDENTITIES)
    )


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_a_head_is_carried_over_by_class_name(name: str) -> None:
    """Row by row: shared classes are the ancestor's wherever they stand, new ones as they were initialised; the backbone is the ancestor's."""
    ancestor, model, fresh = make(name, GLOBAL, seed=1), make(name, REGIONAL, seed=2), make(name, REGIONAL, seed=2)
    account = begin_with(model, ancestor_of(ancestor, GLOBAL), class_map=ClassMap(REGIONAL)).account
    heads = head_names(model)
    ours, theirs, new = model.state_dict(), ancestor.state_dict(), fresh.state_dict()
    assert len(heads) == 2
    for head in heads:
        assert not equal(theirs[head], new[head]) or head.endswith("bias")
        for row, class_name in enumerate(REGIONAL):
            source = theirs[head][GLOBAL.index(class_name)] if class_name in GLOBAL else new[head][row]
            assert equal(ours[head][row], source), (head, class_name)
    assert all(equal(ours[key], theirs[key]) for key in ours if key not in heads)
    assert (account.head.shared, account.head.new) == (("Euonymus", "Betula", "Acer"), ("Quercus", "Rosa"))
    assert account.head.dropped == ("Cornus", "Daphne")
    assert account.share == 1.0


@pytest.mark.parametrize("num_classes", [3, 5, 9])
def test_a_head_of_another_size_is_carried_over_too(num_classes: int) -> None:
    """Fewer classes, more, or as many."""
    classes = tuple(f"species {i}" for i in range(num_classes))
    names = ("species 1", *(f"other {i}" for i in range(4)))
    ancestor, model = make("test_vit", names, seed=1), make("test_vit", classes, seed=2)
    begin_with(model, ancestor_of(ancestor, names), class_map=ClassMap(classes))
    assert equal(model.state_dict()["head.weight"][1], ancestor.state_dict()["head.weight"][0])
    assert not equal(model.state_dict()["head.weight"][0], ancestor.state_dict()["head.weight"][0])


def test_a_head_whose_classes_nobody_recorded_is_never_taken() -> None:
    """Though it has the same shape: its rows may mean anything."""
    ancestor, model, fresh = (make("test_vit", GLOBAL, seed=seed) for seed in (1, 2, 2))
    account = begin_with(model, ancestor_of(ancestor, None), class_map=ClassMap(GLOBAL)).account
    assert account.new_head == ("head.weight", "head.bias")
    assert account.reheaded == ()
    assert account.head.new == GLOBAL
    assert equal(model.state_dict()["head.weight"], fresh.state_dict()["head.weight"])


@pytest.mark.parametrize(("old", "new"), [(32, 64), (64, 32), (48, 160)])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_a_position_embedding_is_resized_as_timm_does(name: str, old: int, new: int) -> None:
    """Equal to what timm's own `set_input_size` makes of the ancestor; everything else stays as it is."""
    ancestor, model = make(name, GLOBAL, seed=1, image_size=old), make(name, GLOBAL, seed=2, image_size=new)
    given = ancestor_of(ancestor, GLOBAL)
    account = begin_with(model, given, class_map=ClassMap(GLOBAL)).account
    ancestor.set_input_size(img_size=(new, new))  # type: ignore[operator]
    assert account.resized == ("pos_embed",)
    assert account.share == 1.0
    ours, wanted = model.state_dict(), ancestor.state_dict()
    assert ours["pos_embed"].shape != given.state["pos_embed"].shape
    assert all(equal(ours[key], wanted[key]) for key in ours)


def test_every_tensor_is_accounted_for_once() -> None:
    """Missing, unexpected and of another shape are named, on either side no tensor is named twice or never."""
    ancestor, model = make("test_vit", GLOBAL, seed=1), make("test_vit", REGIONAL, seed=2)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = ancestor_of(ancestor, GLOBAL)
    state = dict(given.state)
    del state["blocks.0.norm1.weight"]
    state |= {"extra.weight": torch.ones(3), "blocks.1.norm1.weight": torch.ones(7)}
    given = Ancestor(given.descent, state, given.class_map, given.lineage)
    account = begin_with(model, given, class_map=ClassMap(REGIONAL)).account
    assert account.missing == ("blocks.0.norm1.weight",)
    assert account.reshaped == ("blocks.1.norm1.weight",)
    assert account.unexpected == ("extra.weight",)
    taken = account.loaded + account.resized + account.reheaded + account.new_head + account.reshaped
    assert sorted(taken + account.missing) == sorted(fresh)
    assert sorted(taken + account.unexpected) == sorted(state)
    backbone = sum(tensor.numel() for name, tensor in fresh.items() if not name.startswith("head."))
    assert account.share == pytest.approx(1 - 128 / backbone, abs=1e-12)
    for name in (*account.missing, *account.reshaped):
        assert equal(model.state_dict()[name], fresh[name])


@pytest.mark.parametrize(
    ("theirs", "ours"), [("test_resnet", "test_vit"), ("test_vit", "test_vit2"), ("test_vit", "test_vit3")]
)
def test_another_architecture_is_refused_and_the_model_untouched(theirs: str, ours: str) -> None:
    """Less than the stated share of the backbone: the error counts what is missing and of another shape."""
    model = make(ours, GLOBAL, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        InitError, match=r"gives [0-9.]+ % of the backbone's parameters, expected at least 90 %: [0-9]+ missing"
    ):
        begin_with(model, ancestor_of(make(theirs, GLOBAL, seed=1), GLOBAL), class_map=ClassMap(GLOBAL))
    assert all(equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_no_numbers_are_refused() -> None:
    """Named before they spoil a run."""
    given = ancestor_of(make("test_vit", GLOBAL, seed=1), GLOBAL)
    given.state["norm.weight"][3] = float("nan")
    with pytest.raises(InitError, match=r"1 tensors hold NaN or Inf \(norm.weight\)"):
        begin_with(make("test_vit", GLOBAL, seed=2), given, class_map=ClassMap(GLOBAL))


def test_the_first_trainers_file_is_read_with_its_class_names_and_without(tmp_path: Path) -> None:
    """`model_state_dict`, also out of DDP; a head only under `class_names`; its lineage is unknown."""
    ancestor = make("test_vit", GLOBAL, seed=1)
    state = {f"module.{name}": tensor for name, tensor in ancestor.state_dict().items()}
    for names in (None, list(GLOBAL)):
        torch.save({"model_state_dict": state, "epoch": 15, "class_names": names}, tmp_path / "best.pt")
        given = open_ancestor(tmp_path / "best.pt")
        assert given.lineage.unknown == (str(tmp_path / "best.pt"),)
        model = make("test_vit", REGIONAL, seed=2)
        account = begin_with(model, given, class_map=ClassMap(REGIONAL)).account
        assert account.share == 1.0
        assert account.reheaded == (() if names is None else ("head.weight", "head.bias"))
        assert equal(model.state_dict()["norm.weight"], ancestor.state_dict()["norm.weight"])


class Malicious:
    """A pickle that would run a command where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path: Path) -> None:
    """It does not run, and the one line does not advise to let it."""
    torch.save({"model_state_dict": {}, "surprise": Malicious(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(InitError, match="not unpickled because that can run code") as caught:
        open_ancestor(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file must be malicious, or the test proves nothing"


def test_what_is_no_ancestor_says_what_was_found(tmp_path: Path) -> None:
    """Nothing, an empty folder, a run without a best checkpoint, files of other content."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state": {}}, tmp_path / "other.pt")
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "class_names": ["x", "x"]}, tmp_path / "twice.pt")
    torch.save({"model_state_dict": {"a": torch.ones(9)}}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-30])
    for name, found in {
        "absent": "nothing is here; name a run folder",
        "empty": "no run and no checkpoint in this folder",
        "begun": "no best.json, so there is no best checkpoint yet",
        "text.pt": "no file of torch.save",
        "cut.pt": "is cut, or no file of torch.save",
        "other.pt": "holds no weights under 'model_state_dict'",
        "twice.pt": "'class_names' is not a list of distinct names",
    }.items():
        with pytest.raises(UserError, match=r"^model\.init_from: ") as caught:
            open_ancestor(tmp_path / name)
        assert found in str(caught.value), name
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run on one dataset, and another dataset with other photographs of partly the same classes."""
    folder = tmp_path_factory.mktemp("init_from")
    first = fill(folder / "global", dict.fromkeys(GLOBAL, 8))
    fill(folder / "regional", dict.fromkeys(REGIONAL, 8), first=first)
    for name in ("global", "regional"):
        build(folder / name, folder / f"{name}_dataset", near_distance=None)
    config = write_config(folder / "config.yaml", folder / "global_dataset", model="test_vit", epochs=1)
    train(config, folder / "global_run", folder)
    return folder / "global_run", folder / "regional_dataset"


def train(config: Path, run_dir: Path, folder: Path, *arguments: str | Path, world_size: int = 1) -> str:
    """Run the command; what its main process said."""
    finished = command_on_ranks(
        world_size, "aplantida_dist.train", ["--config", config, "--run-dir", run_dir, *arguments], folder
    )
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout


def test_a_run_tells_what_it_began_with(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """On the screen, in init_from.json, in every row and checkpoint; and the first steps show that the weights are the ancestor's."""
    ancestor, dataset = grounds
    config = write_config(tmp_path / "config.yaml", dataset, model="test_vit", epochs=2)
    # A rate of almost nothing: what is saved is what the run began with.
    still = [f"model.init_from={ancestor}", "optimizer.peak_lr=1.0e-12", "optimizer.weight_decay=0.0"]
    said = train(config, tmp_path / "run", tmp_path, *still)
    checkpoint = next((ancestor / "checkpoints").glob("step_*"))
    assert f"init_from {checkpoint} (" in said
    assert "100.00 % of the backbone" in said
    assert "classes: 3 carried over by name · 2 new (Quercus, Rosa) · 2 dropped (Cornus, Daphne)" in said
    told = json.loads((tmp_path / "run" / "init_from.json").read_text())
    best = json.loads((ancestor / "checkpoints" / "best.json").read_text())
    assert (told["path"], told["digest"]) == (str(checkpoint), best["digest"])
    assert sorted(told["head"]["new"]) == ["Quercus", "Rosa"]
    ours = load_file(max((tmp_path / "run" / "checkpoints").glob("step_*")) / "model.safetensors")
    theirs = load_file(checkpoint / "model.safetensors")
    assert set(told["loaded"]) == {name for name in ours if not name.startswith("head.")}
    assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in told["loaded"])
    position = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "position.json").read_text())
    assert position["digests"]["init_from"] == best["digest"]
    assert position["lineage"]["ancestors"] == [{"path": str(checkpoint), "digest": best["digest"]}]
    assert [row["digests"]["init_from"] for row in rows_of(tmp_path / "run")] == [best["digest"]] * 2


def test_a_resume_is_exact_and_needs_the_ancestor_no_more(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """The checkpoint decides: the ancestor may be gone. The config must still name it."""
    ancestor, dataset = grounds
    moved = shutil.copytree(ancestor, tmp_path / "ancestor")
    config = write_config(tmp_path / "config.yaml", dataset, model="test_vit", epochs=3, every_steps=1)
    overrides = [f"model.init_from={moved}", "checkpoint.keep_last=100"]
    train(config, tmp_path / "whole", tmp_path, *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=3)
    shutil.rmtree(moved)
    said = train(config, tmp_path / "broken", tmp_path, *overrides)
    assert "going on from step 3" in said
    assert json.dumps(rows_of(tmp_path / "whole")) == json.dumps(rows_of(tmp_path / "broken"))
    last = [max((tmp_path / name / "checkpoints").glob("step_*")) for name in ("whole", "broken")]
    for name in ("model.safetensors", "optimizer.safetensors", "seen.npy"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    assert "model.init_from was" in train_complaint(config, tmp_path, f"model.init_from={ancestor}")
    assert "model.init_from was" in train_complaint(config, tmp_path)
    assert "nothing is here" in train_complaint(config, tmp_path, "--run-dir", tmp_path / "anew", overrides[0])


def test_two_ranks_begin_with_the_same_weights_as_one(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """The first epoch's loss agrees to the last bits of fp32."""
    ancestor, dataset = grounds
    config = write_config(tmp_path / "config.yaml", dataset, model="test_vit", epochs=1)
    losses = []
    for world_size in (1, 2):
        train(config, tmp_path / f"run_{world_size}", tmp_path, f"model.init_from={ancestor}", world_size=world_size)
        losses.append(rows_of(tmp_path / f"run_{world_size}")[0]["train"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_two_beginnings_are_one_too_many(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """timm's weights and a run's exclude each other."""
    config = write_config(tmp_path / "config.yaml", grounds[1], model="test_vit")
    said = train_complaint(config, tmp_path, f"model.init_from={grounds[0]}", "model.pretrained=true")
    assert "model.pretrained: found true, expected false where model.init_from says what to begin with" in said


def test_a_class_map_that_was_exchanged_is_refused(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """classes.json of an ancestor must be the one that its checkpoint was trained with."""
    run = shutil.copytree(grounds[0], tmp_path / "run")
    ClassMap(tuple(reversed(GLOBAL))).save(run / "classes.json")
    with pytest.raises(InitError, match="is not the class map of"):
        open_ancestor(run)


def test_a_checkpoints_folder_can_be_named(grounds: tuple[Path, Path], tmp_path: Path) -> None:
    """Below its run it has the run's class names; copied out of it, it has none, and its head is not taken."""
    (checkpoint,) = (grounds[0] / "checkpoints").glob("step_*")
    assert open_ancestor(checkpoint).class_map == ClassMap(GLOBAL)
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint")
    alone = open_ancestor(tmp_path / "elsewhere" / "checkpoint")
    assert alone.class_map is None
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, "norm.weight": weights["norm.weight"] + 1}, checkpoint.parent / "changed")
    shutil.copy(checkpoint.parent / "changed", tmp_path / "elsewhere" / "checkpoint" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors has changed since it was written"):
        open_ancestor(tmp_path / "elsewhere" / "checkpoint")
    (checkpoint.parent / "changed").unlink()
