"""`patch` and `unpatch`: what may be patched, what a patched model still can, and that it comes back as it was."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import select
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import FAMILIES

import promoe_triton
from promoe_triton import PromoeError, budget
from promoe_triton.links import choice
from promoe_triton.links.filling import SlotFiller
from promoe_triton.memory import in_files
from promoe_triton.patch import _rest, _swap
from promoe_triton.patch._families import describe
from promoe_triton.protocols import ExpertKey

ROOT = Path(__file__).parent.parent
NEW = 5


def build(name: str = "mixtral", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[name].build()


def tokens(model: Any, name: str = "mixtral", prompt: int = 7) -> list[int]:
    inputs = FAMILIES[name].inputs(model, prompt)
    result: list[list[int]] = model.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist()
    return result[0]


def logits(model: Any, name: str = "mixtral") -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**FAMILIES[name].inputs(model, 7)).logits
    return result


@pytest.fixture
def expected() -> list[int]:
    return tokens(build())


@pytest.fixture
def patched(tmp_path: Path) -> Any:
    """A model of 12 experts with 4 slots, its experts in a spool."""
    return promoe_triton.patch(build(), slots=4, store="spool", spool_dir=tmp_path)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that patching could leave behind: classes, parameter objects, their bits, attributes."""
    return {
        "classes": [(path, type(module)) for path, module in model.named_modules()],
        "attributes": [(path, sorted(module.__dict__)) for path, module in model.named_modules()],
        "buffers": [name for name, _ in model.named_buffers()],
        "objects": [(name, id(p), p.requires_grad, p.device) for name, p in model.named_parameters()],
        "bits": {
            name: p.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for name, p in model.named_parameters()
            if not p.is_meta
        },
    }


class TestRefused:
    """A clear error, and nothing has changed."""

    def refused(self, model: Any, message: str, error: type[Exception] = PromoeError, **options: Any) -> None:
        before = state_of(model)
        with pytest.raises(error, match=message):
            promoe_triton.patch(model, **({"slots": 4} | options))
        assert state_of(model) == before

    def test_no_experts(self) -> None:
        self.refused(nn.Sequential(nn.Linear(3, 3)).eval(), "Sequential has no MoE experts .* nothing was patched")

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"expects a torch module .* got str"):
            promoe_triton.patch("mixtral", slots=4)  # type: ignore[type-var]

    def test_twice(self, patched: Any, expected: list[int]) -> None:
        self.refused(patched, "patched already; unpatch it first")
        assert tokens(patched) == expected

    def test_a_block_whose_forward_was_replaced(self) -> None:
        """As the hub's kernels do it: experts that the block no longer calls would be patched in vain."""
        model = build()
        model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
        self.refused(model, r"forward of model\.layers\.1\.mlp was replaced .*use_kernels=False")

    def test_experts_whose_forward_was_replaced(self) -> None:
        model = build()
        model.model.layers[1].mlp.experts.forward = lambda *args: args[0]
        self.refused(model, r"forward of model\.layers\.1\.mlp\.experts was replaced")

    @pytest.mark.parametrize("value", [0.25, 64, "12GiB"], ids=["share", "count", "size"])
    def test_slots_in_the_place_of_the_configuration(self, value: Any) -> None:
        message = f"config must be a promoe_triton.Config, got {value!r}; .* write slots={value!r}"
        model = build()
        before = state_of(model)
        with pytest.raises(TypeError, match=message):
            promoe_triton.patch(model, value)
        with pytest.raises(TypeError, match=message):
            promoe_triton.from_pretrained("no/such/model", value)
        assert state_of(model) == before

    def test_a_part_of_a_patched_model(self, patched: Any) -> None:
        self.refused(patched.model, "patched already")

    def test_a_model_around_a_patched_one(self, patched: Any) -> None:
        outer = nn.Sequential(patched)
        outer.training = False
        self.refused(outer, "patched already")

    def test_training(self) -> None:
        self.refused(build().train(), r"training mode; call model\.eval\(\)")

    @pytest.mark.parametrize(
        ("method", "named"),
        [
            pytest.param("gptq", "gptq", id="by-name"),
            pytest.param(SimpleNamespace(value="bitsandbytes"), "bitsandbytes", id="by-enum"),
        ],
    )
    def test_quantised(self, method: Any, named: str) -> None:
        model = build()
        model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
        self.refused(model, f"quantised by {named}, which is not supported yet; use a checkpoint of plain")

    def test_quantised_experts(self) -> None:
        model = build()
        experts = model.model.layers[1].mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
        self.refused(model, r"MixtralExperts\.down_proj has dtype torch\.int8.*quantised")

    @pytest.mark.parametrize("where", ["", "model.layers.1.mlp"], ids=["root", "inner"])
    def test_accelerate_hooks(self, where: str) -> None:
        model = build()
        add_hook_to_module(model.get_submodule(where), ModelHook())
        self.refused(model, f"accelerate's hooks move weights .*{where or 'its root'}.*without device_map")

    def test_not_on_the_cpu(self) -> None:
        model = build().to("meta")
        with pytest.raises(PromoeError, match=r"must be on the CPU .*, but has parameters on meta"):
            promoe_triton.patch(model, slots=4)

    def test_expert_parallel(self) -> None:
        model = build()
        model.model.layers[0].mlp.experts._is_expert_parallel = True
        self.refused(model, "MixtralExperts runs expert parallel")

    @pytest.mark.parametrize("slots", [4, 0.5, "100KB"], ids=["count", "share", "size"])
    def test_more_slots_than_memory(self, slots: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # What the experts themselves take is given back, and counts as free.
        monkeypatch.setattr(budget, "available_memory", lambda: -(10**9))
        self.refused(build(), r"slots take .*, but only .* are free", slots=slots, store="spool", spool_dir=tmp_path)
        gc.collect()
        assert not os.listdir(tmp_path)

    def test_weights_in_mapped_files_give_no_memory_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The experts of gpt_oss are stacked in the file as in the model: the loader leaves them there."""
        build("gpt_oss").save_pretrained(tmp_path)
        model = type(build("gpt_oss")).from_pretrained(tmp_path)
        parameters = dict(model.named_parameters())
        assert len(in_files(parameters.values())) == len(parameters)
        dense = sum(p.nbytes for name, p in parameters.items() if ".experts." not in name)
        monkeypatch.setattr(budget, "available_memory", lambda: dense + 10)
        self.refused(model, r"slots take .*, but only 10 B of memory are free", slots=2)
        self.refused(model, r"kB of weights lie in mapped files, .* but only .* are free", slots=None)

    def test_slots_too_small_for_an_expert(self) -> None:
        self.refused(build(), "100 B hold no expert: one slot takes 23 kB", ValueError, slots="100B")

    def test_a_checkpoint_that_is_asked_for_and_is_none(self) -> None:
        self.refused(build(), "not loaded from a checkpoint", store="checkpoint")

    def test_a_checkpoint_that_is_asked_for_and_differs(self, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        model = type(build()).from_pretrained(tmp_path)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[3, 2, 1] += 1
        self.refused(model, f"expert 3 of MoE layer 1 differs from checkpoint {tmp_path}", store="checkpoint")

    def test_options_and_a_profile_that_is_none(self, tmp_path: Path) -> None:
        self.refused(build(), "no popularity profile", profile=tmp_path / "none.json", store="spool")

    @pytest.mark.parametrize("action", [promoe_triton.unpatch, promoe_triton.stats], ids=["unpatch", "stats"])
    def test_what_needs_a_patched_model(self, action: Callable[[nn.Module], Any]) -> None:
        model = build()
        before = state_of(model)
        with pytest.raises(PromoeError, match=r"this MixtralForCausalLM is not patched; call promoe_triton\.patch"):
            action(model)
        assert state_of(model) == before


class TestThereAndBack:
    def test_the_same_object_comes_back(self) -> None:
        model = build()
        assert promoe_triton.patch(model, slots=4, store="spool") is model
        assert promoe_triton.unpatch(model) is model

    @pytest.mark.parametrize("slots", [1, 5, 12], ids=["one-slot", "five", "resident"])
    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "longcat_flash", "muse_spark"])
    def test_everything_is_as_it_was(self, name: str, slots: int, tmp_path: Path) -> None:
        model = build(name)
        model.requires_grad_(False)
        next(p for p in model.parameters() if p.dim() == 3 or p.dim() == 2).requires_grad_(True)
        before, want = state_of(model), logits(model, name)
        promoe_triton.patch(model, slots=slots, store="spool", spool_dir=tmp_path)
        assert type(model) is not before["classes"][0][1]
        assert torch.equal(logits(model, name), want)
        promoe_triton.unpatch(model)
        assert state_of(model) == before
        assert torch.equal(logits(model, name), want)
        gc.collect()
        assert not os.listdir(tmp_path)

    def test_from_its_own_checkpoint(self, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        model = type(build()).from_pretrained(tmp_path)
        before = state_of(model)
        promoe_triton.patch(model, slots=4)
        assert promoe_triton.stats(model).store == f"checkpoint {tmp_path}"
        promoe_triton.unpatch(model)
        assert state_of(model) == before

    @pytest.mark.parametrize("slots", [2, None], ids=["two-slots", "resident"])
    def test_nothing_that_stays_lies_in_a_file(self, slots: int | None, tmp_path: Path) -> None:
        original = build("gpt_oss")
        original.config.tie_word_embeddings = True
        original.tie_weights()
        original.save_pretrained(tmp_path)
        model = type(original).from_pretrained(tmp_path)
        before = state_of(model)
        assert in_files(model.parameters())
        promoe_triton.patch(model, slots=slots)
        assert not in_files((*model.parameters(), *model.buffers()))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        promoe_triton.unpatch(model)
        assert state_of(model) == before

    def test_changed_weights_rest_in_a_spool(self, tmp_path: Path) -> None:
        (tmp_path / "spool").mkdir()
        build().save_pretrained(tmp_path / "model")
        model = type(build()).from_pretrained(tmp_path / "model")
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.mul_(1.5)
        want = logits(model)
        promoe_triton.patch(model, slots=4, spool_dir=tmp_path / "spool")
        assert promoe_triton.stats(model).store.startswith(f"spool {tmp_path / 'spool'}")
        assert torch.equal(logits(model), want)

    def test_again_and_again(self, expected: list[int]) -> None:
        model = build()
        before = state_of(model)
        for slots in (3, 12, 1):
            promoe_triton.patch(model, slots=slots, store="spool")
            assert tokens(model) == expected
            promoe_triton.unpatch(model)
        assert state_of(model) == before

    def test_as_a_context(self, expected: list[int]) -> None:
        model = build()
        before = state_of(model)
        with promoe_triton.patch(model, slots=4, store="spool") as inside:
            assert inside is model
            assert tokens(inside) == expected
        assert state_of(model) == before

    def test_a_context_left_by_an_exception(self) -> None:
        model = build()
        before = state_of(model)
        with pytest.raises(KeyError, match="mine"), promoe_triton.patch(model, slots=4, store="spool"):
            raise KeyError("mine")
        assert state_of(model) == before

    def test_no_room_for_the_weights(self, patched: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as context:
            context.setattr(budget, "available_memory", lambda: 10)
            with pytest.raises(PromoeError, match=r"putting the weights back needs \d+ kB of memory, but only 10 B"):
                promoe_triton.unpatch(patched)
        assert tokens(patched) == expected
        assert tokens(promoe_triton.unpatch(patched)) == expected

    def test_slots_are_no_room_for_the_weights(self, patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are kept until the last weight has been read."""
        needed = patched._promoe_runtime.expert_bytes
        with monkeypatch.context() as context:
            context.setattr(budget, "available_memory", lambda: needed - 1)
            with pytest.raises(PromoeError, match="putting the weights back needs"):
                promoe_triton.unpatch(patched)
        monkeypatch.setattr(budget, "available_memory", lambda: needed)
        promoe_triton.unpatch(patched)

    def test_loaded_without_weights_and_unpatched(self, tmp_path: Path) -> None:
        original = build()
        original.save_pretrained(tmp_path)
        model = promoe_triton.unpatch(promoe_triton.from_pretrained(str(tmp_path), slots=4))
        assert type(model) is type(original)
        bits = {name: tensor.numpy().tobytes() for name, tensor in original.state_dict().items()}
        assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == bits
        assert not any(p.is_meta for p in model.parameters())


class TestWeights:
    """What reads or writes a patched model's weights from outside."""

    @pytest.mark.parametrize("slots", [1, 4, 12], ids=["one-slot", "four", "resident"])
    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "longcat_flash"])
    def test_state_dict(self, name: str, slots: int, tmp_path: Path) -> None:
        want = build(name).state_dict()
        model = promoe_triton.patch(build(name), slots=slots, store="spool", spool_dir=tmp_path)
        logits(model, name)
        state = model.state_dict()
        assert list(state) == list(want)
        assert all(torch.equal(state[key], want[key]) for key in want)
        experts = "model.layers.1" if name != "dbrx" else "transformer.blocks.1"
        inner = model.get_submodule(experts).state_dict(prefix="x.")
        assert inner.keys() == {key.replace(experts, "x", 1) for key in want if key.startswith(experts)}
        assert all(torch.equal(inner[key], want[key.replace("x", experts, 1)]) for key in inner)

    def test_state_dict_without_room(self, patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "available_memory", lambda: 10)
        with pytest.raises(PromoeError, match=r"the state dict of .* needs .* only 10 B are free"):
            patched.state_dict()

    @pytest.mark.parametrize("action", ["state_dict", "save_pretrained"])
    def test_room_for_all_experts_is_asked_for_once(
        self, action: str, patched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And then for those that are still to come."""
        experts = [layer.nbytes for layer in patched._promoe_runtime.layers]
        assert len(experts) == 2
        free = iter([sum(experts), sum(experts), experts[1]])
        monkeypatch.setattr(budget, "available_memory", lambda: next(free))
        getattr(patched, action)(**({"save_directory": tmp_path / "saved"} if action == "save_pretrained" else {}))

    def test_parameters_keep_their_names_shapes_and_count(self, patched: Any) -> None:
        original = build()
        assert [(n, p.shape, p.dtype) for n, p in patched.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in original.named_parameters()
        ]
        assert patched.num_parameters() == original.num_parameters()

    @pytest.mark.parametrize(
        "how",
        [
            pytest.param({}, id="one-file"),
            pytest.param({"max_shard_size": "60KB"}, id="shards"),
            pytest.param({"save_original_format": False}, id="stacked"),
        ],
    )
    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "longcat_flash"])
    def test_save_pretrained(self, name: str, how: dict[str, Any], tmp_path: Path) -> None:
        model = build(name)
        model.save_pretrained(tmp_path / "original", **how)
        promoe_triton.patch(model, slots=4, store="spool")
        model.save_pretrained(tmp_path / "patched", **how)
        files = sorted(os.listdir(tmp_path / "original"))
        assert sorted(os.listdir(tmp_path / "patched")) == files
        assert (len(files) > 5) == ("max_shard_size" in how)
        for file in files:
            assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "original" / file).read_bytes(), file

    def test_save_pretrained_over_its_own_checkpoint(self, tmp_path: Path, expected: list[int]) -> None:
        build().save_pretrained(tmp_path, max_shard_size="60KB")
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        model: Any = promoe_triton.from_pretrained(str(tmp_path), slots=2)
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        assert {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")} == {
            name: content for name, content in before.items() if name.endswith(".safetensors")
        }
        assert tokens(model) == expected

    def test_load_state_dict_is_refused_whole(self, patched: Any, expected: list[int]) -> None:
        with pytest.raises(PromoeError, match="cannot load weights into experts that rest in a store; unpatch"):
            patched.load_state_dict(build(seed=1).state_dict())
        assert tokens(patched) == expected

    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    def test_load_state_dict_where_all_is_resident(self, assign: bool) -> None:
        other = build(seed=1)
        model = promoe_triton.patch(build(), slots=1.0)
        tokens(model)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(logits(model), logits(other))

    @pytest.mark.parametrize(
        "cast",
        [
            pytest.param(lambda model: model.to(torch.bfloat16), id="to-bfloat16"),
            pytest.param(lambda model: model.half(), id="half"),
            pytest.param(lambda model: model.double(), id="double"),
            pytest.param(lambda model: model.model.layers[1].mlp.experts.bfloat16(), id="experts"),
        ],
    )
    def test_a_cast_is_refused_whole(self, cast: Callable[[Any], Any], patched: Any, expected: list[int]) -> None:
        with pytest.raises(PromoeError, match=r"the experts rest in .* and cannot be .*; unpatch first"):
            cast(patched)
        assert {p.dtype for p in patched.parameters()} == {torch.float32}
        assert tokens(patched) == expected

    @pytest.mark.parametrize(
        "move",
        [
            pytest.param(lambda model: model.to("cpu"), id="cpu"),
            pytest.param(lambda model: model.float(), id="float"),
            pytest.param(lambda model: model.to(torch.float32, non_blocking=True), id="to-float32"),
        ],
    )
    def test_a_move_to_where_it_is(self, move: Callable[[Any], Any], patched: Any, expected: list[int]) -> None:
        assert move(patched) is patched
        assert tokens(patched) == expected

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
    def test_a_cast_where_all_is_resident(self, dtype: torch.dtype, used: bool) -> None:
        model = promoe_triton.patch(build(), slots=12)
        if used:
            tokens(model)
        want = logits(build().to(dtype))
        assert torch.equal(logits(model.to(dtype)), want)
        assert torch.equal(logits(promoe_triton.unpatch(model)), want)

    def test_weights_changed_in_place_where_all_is_resident(self) -> None:
        model = promoe_triton.patch(build(), slots=12)
        logits(model)
        other = build()
        for changed in (model, other):
            changed.model.layers[0].mlp.experts.down_proj.data.mul_(2)
        assert torch.equal(logits(model), logits(other))


class TestCopies:
    def test_no_shallow_copy(self, patched: Any, expected: list[int]) -> None:
        with pytest.raises(PromoeError, match=r"cannot be copied shallowly.* use copy\.deepcopy"):
            copy.copy(patched)
        assert tokens(patched) == expected

    def test_no_move_to_meta(self, patched: Any, expected: list[int]) -> None:
        with pytest.raises(PromoeError, match="cannot be moved to meta"):
            patched.to("meta")
        assert tokens(patched) == expected

    @pytest.mark.parametrize("slots", [3, 12], ids=["slots", "resident"])
    def test_deepcopy_is_independent(self, slots: int, expected: list[int], tmp_path: Path) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool", spool_dir=tmp_path)
        twin = copy.deepcopy(model)
        assert type(twin) is type(model)
        assert tokens(twin) == tokens(model) == expected
        own = {p.data_ptr() for p in model.parameters() if not p.is_meta}
        assert not own & {p.data_ptr() for p in twin.parameters() if not p.is_meta}
        before = promoe_triton.stats(twin)
        tokens(model)
        assert promoe_triton.stats(twin) == before, "the copy counts for itself"
        promoe_triton.unpatch(model)
        assert tokens(twin) == tokens(model) == expected, "the copy's store outlives the original"
        del model
        gc.collect()
        assert tokens(twin) == expected
        assert tokens(promoe_triton.unpatch(twin)) == expected
        gc.collect()
        assert not os.listdir(tmp_path)

    def test_the_original_outlives_the_copy(self, patched: Any, expected: list[int]) -> None:
        twin = copy.deepcopy(patched)
        assert tokens(twin) == expected
        del twin
        gc.collect()
        assert tokens(patched) == expected

    def test_both_at_once(self, patched: Any, expected: list[int]) -> None:
        twin = copy.deepcopy(patched)
        assert in_threads([lambda: tokens(patched), lambda: tokens(twin)]) == [expected, expected]

    def test_a_copy_compiles_as_itself(self, patched: Any) -> None:
        """Compiled code finds a layer by its name, which a copy must not share."""
        twin = copy.deepcopy(patched)
        names = [module._promoe_name for model in (patched, twin) for module in _swap.promoe_modules(model)]
        assert len({int(name) for name in names}) == 4

    def test_a_copy_without_room(self, patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "available_memory", lambda: 10)
        with pytest.raises(PromoeError, match=r"a copy of the model, with slots of its own, needs .* only 10 B"):
            copy.deepcopy(patched)

    def test_a_part_cannot_be_copied(self, patched: Any, expected: list[int]) -> None:
        with pytest.raises(PromoeError, match="copy the whole model, or unpatch it first"):
            copy.deepcopy(patched.model.layers[0])
        assert tokens(patched) == expected

    @pytest.mark.parametrize("slots", [4, 12], ids=["slots", "resident"])
    @pytest.mark.parametrize(
        "dump",
        [
            pytest.param(pickle.dumps, id="pickle"),
            pytest.param(lambda model: torch.save(model, io.BytesIO()), id="torch.save"),
        ],
    )
    def test_pickle_is_refused(self, dump: Callable[[Any], Any], slots: int) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool")
        with pytest.raises(PromoeError, match="cannot be pickled; use save_pretrained, or unpatch"):
            dump(model)
        assert pickle.loads(pickle.dumps(promoe_triton.unpatch(model))) is not None

    def test_two_models_in_one_process(self, tmp_path: Path) -> None:
        names = ("mixtral", "gpt_oss")
        want = {name: tokens(build(name), name) for name in names}
        models = {
            name: promoe_triton.patch(build(name), slots=4, store="spool", spool_dir=tmp_path, policy=policy)
            for name, policy in zip(names, ("lru", "lfru"), strict=True)
        }
        for name in (*names, *reversed(names)):
            assert tokens(models[name], name) == want[name]
        promoe_triton.unpatch(models["mixtral"])
        assert tokens(models["gpt_oss"], "gpt_oss") == want["gpt_oss"]
        assert tokens(models["mixtral"], "mixtral") == want["mixtral"]


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """Run all at once; a thread's exception is its result."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class TestUse:
    @pytest.mark.parametrize("partition", ["layer", "global"])
    def test_two_threads_on_one_model(self, partition: Any) -> None:
        original = build()
        want = [tokens(original, prompt=prompt) for prompt in (3, 9)]
        model = promoe_triton.patch(original, slots=4, store="spool", partition=partition)
        for _ in range(3):
            got = in_threads([lambda: tokens(model, prompt=3), lambda: tokens(model, prompt=9)])
            assert got == want

    def test_patience_almost_without_end(self, expected: list[int]) -> None:
        longest = threading.TIMEOUT_MAX
        model = promoe_triton.patch(build(), slots=4, store="spool", lock_timeout=longest, io_timeout=longest)
        assert tokens(model) == expected

    @pytest.mark.parametrize("slots", [4, None], ids=["few", "all"])
    def test_an_input_on_another_device(self, slots: int | None, expected: list[int]) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool")
        experts = model.model.layers[0].mlp.experts
        x_TD = torch.empty(3, 48, device="meta")
        with pytest.raises(PromoeError, match="slots are on cpu, but their input is on meta; move it there"):
            experts(x_TD, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
        assert tokens(model) == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    def test_states_of_another_dtype(self, weights: torch.dtype, dtype: torch.dtype) -> None:
        """What the stock experts make of them: the type of the states is that of the result."""
        model = build().to(weights)
        call = (torch.randn(3, 48).to(dtype), torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.rand(3, 2).to(dtype))
        experts = model.model.layers[0].mlp.experts
        with torch.no_grad():
            want = experts(*call)
            promoe_triton.patch(model, slots=4, store="spool", predictor="none")
            got = experts(*call)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)

    def test_repr_tells_the_truth(self, patched: Any, tmp_path: Path) -> None:
        (place,) = tmp_path.iterdir()
        text = repr(patched)
        assert "2 x MixtralDecoderLayer" in text, "torch prints equal layers once"
        assert "ProMoEMixtralExperts" in text
        assert f"experts=6, slots=2, store=spool {place}" in text
        promoe_triton.unpatch(patched)
        assert "ProMoE" not in repr(patched)
        promoe_triton.patch(patched, slots=12)
        assert "experts=6, all resident" in repr(patched)

    def test_saved_configurations_name_the_original_class(self, patched: Any, tmp_path: Path) -> None:
        patched.config.save_pretrained(tmp_path / "config")
        patched.save_pretrained(tmp_path / "model")
        assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]

    @pytest.mark.parametrize("slots", [4, 12], ids=["slots", "resident"])
    def test_an_input_with_a_gradient_warns_once_and_is_detached(self, slots: int) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool")
        want = logits(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            for _ in range(2):
                got = model(**FAMILIES["mixtral"].inputs(model, 7)).logits
        assert torch.equal(got, want)
        assert len(seen) == 1
        assert "its output is detached" in str(seen[0].message)
        experts = model.model.layers[0].mlp.experts
        x_TD = torch.randn(3, 48, requires_grad=True)
        with pytest.warns(UserWarning, match="requires a gradient"):
            y_TD = experts(x_TD, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
        assert not y_TD.requires_grad

    def test_no_warning_without_gradients(self, patched: Any) -> None:
        with torch.inference_mode():
            patched(**FAMILIES["mixtral"].inputs(patched, 7))  # a warning would be an error

    @pytest.mark.parametrize("slots", [4, 12], ids=["slots", "resident"])
    def test_training_is_refused(self, slots: int) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool")
        want = logits(model)
        model.train()
        with pytest.raises(PromoeError, match=r"cannot be trained: .*unpatch"):
            model(**FAMILIES["mixtral"].inputs(model, 7))
        model.eval()
        assert torch.equal(logits(model), want)

    def test_stats_count(self, patched: Any) -> None:
        stats = promoe_triton.stats(patched)
        assert (stats.experts, stats.slots) == (12, 4)
        assert stats.hits == stats.misses == stats.prefills == stats.decodes == 0
        assert stats.bytes_read >= 4 * 3 * 48 * 40 * 4, "four experts were loaded at the start"
        tokens(patched)
        after = promoe_triton.stats(patched)
        assert (after.prefills, after.decodes) == (1, NEW - 1)
        # Two experts for each of two layers and every token after the prompt.
        assert after.hits + after.misses >= (NEW - 1) * 2 * 2
        assert after.misses > 0
        assert after.bytes_read - stats.bytes_read >= after.misses * 3 * 48 * 40 * 4
        assert "4 of 12 experts (33%)" in str(after)
        assert after.as_dict()["hit_ratio"] == after.hits / (after.hits + after.misses)

    def test_resident_counts_no_misses_and_reads_nothing(self) -> None:
        model = promoe_triton.patch(build(), slots=12)
        tokens(model)
        stats = promoe_triton.stats(model)
        assert (stats.misses, stats.evictions, stats.bytes_read) == (0, 0, 0)
        assert stats.hits > 0


class TestProfile:
    def ready(self, model: Any) -> set[tuple[int, int]]:
        layers = model._promoe_runtime.layers
        keys = [ExpertKey(layer.index, expert) for layer in layers for expert in range(6)]
        return {tuple(key) for key in keys if layers[key.layer].table.is_ready(key)}

    @pytest.mark.parametrize("partition", ["layer", "global"])
    @pytest.mark.parametrize("policy", ["lru", "lfru", "static"])
    def test_the_popular_are_loaded_at_the_start(self, policy: str, partition: Any, tmp_path: Path) -> None:
        want = tokens(build())
        file = tmp_path / "profile.json"
        file.write_text(json.dumps({"uses": [[0, 5, 0, 0, 7, 0], [0, 0, 9, 0, 0, 8]]}))
        model = promoe_triton.patch(build(), slots=4, store="spool", profile=file, policy=policy, partition=partition)
        assert self.ready(model) == {(0, 1), (0, 4), (1, 2), (1, 5)}
        assert tokens(model) == want

    def test_without_warming_nothing_is_loaded(self, expected: list[int]) -> None:
        model = promoe_triton.patch(build(), slots=4, store="spool", warm=False)
        assert self.ready(model) == set()
        assert promoe_triton.stats(model).bytes_read == 0
        assert tokens(model) == expected

    @pytest.mark.parametrize("slots", [4, 12], ids=["slots", "resident"])
    def test_there_and_back(self, slots: int, tmp_path: Path, expected: list[int]) -> None:
        model = promoe_triton.patch(build(), slots=slots, store="spool")
        tokens(model)
        file = tmp_path / "profile.json"
        promoe_triton.save_profile(model, file)
        uses = json.loads(file.read_text())["uses"]
        assert [len(layer) for layer in uses] == [6, 6]
        stats = promoe_triton.stats(model)
        assert sum(map(sum, uses)) == stats.hits + stats.misses
        again = promoe_triton.patch(build(), slots=4, store="spool", profile=file)
        loaded = {(i, e) for i, layer in enumerate(uses) for e in sorted(range(6), key=lambda e: (-layer[e], e))[:2]}
        assert self.ready(again) == loaded
        assert tokens(again) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param('{"uses": [[1, 2], [3, 4]]}', "profile of another model", id="other-experts"),
            pytest.param('{"uses": [[1, 2, 3, 4, 5, 6]]}', "profile of another model", id="other-layers"),
            pytest.param("no json", "no popularity profile", id="no-json"),
            pytest.param("[]", "no popularity profile", id="a-list"),
            pytest.param('{"used": []}', "no popularity profile", id="other-key"),
            pytest.param('{"uses": 3}', "no popularity profile", id="a-number"),
            pytest.param('{"uses": [["a", 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]}', "profile", id="a-word"),
        ],
    )
    def test_of_another_model_or_none(self, text: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "profile.json"
        file.write_text(text)
        model = build()
        before = state_of(model)
        with pytest.raises(PromoeError, match=message) as error:
            promoe_triton.patch(model, slots=4, store="spool", profile=file)
        assert str(file) in str(error.value)
        assert state_of(model) == before

    def test_of_a_model_that_is_not_patched(self, tmp_path: Path) -> None:
        with pytest.raises(PromoeError, match="not patched"):
            promoe_triton.save_profile(build(), tmp_path / "profile.json")


class TestMemory:
    def test_slots_take_what_the_budget_says(self, tmp_path: Path) -> None:
        for name in ("mixtral", "nemotron_h", "dbrx"):
            build(name).save_pretrained(tmp_path / name)
            model: Any = promoe_triton.from_pretrained(str(tmp_path / name), slots=4)
            memories = {id(m): m for m in model._promoe_runtime.link._shared.filler._memory_of_layer}.values()
            taken = sum(memory.slots * memory.slot_bytes for memory in memories)
            assert taken == promoe_triton.stats(model).slot_bytes

    def test_a_size_is_kept_to(self) -> None:
        model = promoe_triton.patch(build(), slots="100KB", store="spool")
        stats = promoe_triton.stats(model)
        assert 0 < stats.slot_bytes <= 100_000
        assert stats.slots == 100_000 // (stats.slot_bytes // stats.slots)

    def test_ram_comes_back_and_is_never_all_taken(self, tmp_path: Path) -> None:
        """In a process of its own: what `patch` gives back, and the most that `from_pretrained` takes."""
        child = subprocess.Popen(
            [sys.executable, "-c", MEMORY_CHILD, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            assert child.stdin is not None
            try:
                peaks = {}
                sizes = json.loads(self.step(child)[0])
                for name in ("build", "patch", "collected", "ours", "collected again", "stock"):
                    _, start, peak, end = self.step(child, name)
                    peaks[name] = (peak - start, end - start)
            finally:
                child.stdin.close()
                child.wait(60)
        assert child.returncode == 0
        experts, dense, slots = sizes["experts"], sizes["dense"], sizes["slots"]
        assert experts > 300e6
        assert slots < experts / 10
        assert peaks["build"][1] > 0.9 * experts, "the measure sees the experts"
        assert peaks["patch"][1] < -(experts - slots - 20e6), "patch gives the experts' memory back"
        assert peaks["patch"][0] < slots + 100e6, "and takes little on the way"
        assert peaks["ours"][0] < slots + dense + 100e6, "from_pretrained never holds all experts"
        assert peaks["stock"][0] > 0.9 * experts, "the measure would see it if it did"

    def step(self, child: subprocess.Popen[str], name: str | None = None) -> tuple[str, int, int, int]:
        """Let the child do its next step; return what it said, and its anonymous memory before, at most and after."""
        assert child.stdin is not None
        assert child.stdout is not None
        start = peak = rss_anon(child.pid)
        if name:
            child.stdin.write(name + "\n")
            child.stdin.flush()
        while not select.select([child.stdout], [], [], 0.002)[0]:
            peak = max(peak, rss_anon(child.pid))
        said = child.stdout.readline()
        assert said, f"the child has ended at {name or 'its start'}"
        end = rss_anon(child.pid)
        return said, start, max(peak, end), end


def rss_anon(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


MEMORY_CHILD = """
import ctypes, gc, json, sys
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging
import promoe_triton

logging.disable_progress_bar()
torch.set_num_threads(1)
folder = sys.argv[1]
config = Qwen3MoeConfig(
    vocab_size=100, hidden_size=512, moe_intermediate_size=768, num_hidden_layers=4, num_experts=16,
    num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
)
with torch.device("meta"):
    skeleton = Qwen3MoeForCausalLM(config)
sizes = {"experts": 0, "dense": 0, "slots": 4 * (3 * 512 * 768 * 4 + 4096)}
for name, parameter in skeleton.named_parameters():
    sizes["experts" if ".experts." in name else "dense"] += parameter.nbytes

def wait():
    assert input()

def collect():
    gc.collect()
    # What the allocator keeps for later would be taken by the next step without being seen.
    ctypes.CDLL(None).malloc_trim(0)

print(json.dumps(sizes), flush=True)
wait()
model = skeleton.to_empty(device="cpu").eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.01)
print("built", flush=True)
wait()
promoe_triton.patch(model, slots=4, store="spool", spool_dir=folder)
print("patched", flush=True)
wait()
model.save_pretrained(folder + "/model", max_shard_size="50MB")
del model
collect()
print("saved", flush=True)
wait()
model = promoe_triton.from_pretrained(folder + "/model", slots=4)
model(torch.tensor([[1, 2, 3]]))
print("loaded", flush=True)
wait()
del model
collect()
print("gone", flush=True)
wait()
model = Qwen3MoeForCausalLM.from_pretrained(folder + "/model")
print("stock", flush=True)
"""


class TestHub:
    """A hub id, from the local snapshot of a cache folder laid out by hand."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        snapshot = tmp_path / "hub" / "models--some-one--tiny-moe" / "snapshots" / self.COMMIT
        build().save_pretrained(tmp_path / "model", max_shard_size="100KB")
        blobs = snapshot.parent.parent / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
            shutil.move(file, blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        refs = snapshot.parent.parent / "refs"
        refs.mkdir()
        (refs / "main").write_text(self.COMMIT)
        return tmp_path / "hub"

    @pytest.mark.parametrize("revision", [None, "main", COMMIT], ids=["default", "branch", "commit"])
    def test_from_pretrained(self, revision: str | None, cache: Path, expected: list[int]) -> None:
        options = {"revision": revision} if revision else {}
        model = promoe_triton.from_pretrained("some-one/tiny-moe", slots=4, cache_dir=cache, **options)
        assert tokens(model) == expected
        assert promoe_triton.stats(model).store.endswith(f"models--some-one--tiny-moe/snapshots/{self.COMMIT}")

    def test_not_in_the_cache(self, cache: Path) -> None:
        with pytest.raises((PromoeError, OSError), match=r"some-one/other|couldn't find them in the cached files"):
            promoe_triton.from_pretrained("some-one/other", slots=4, cache_dir=cache)

    def test_offline_with_the_usual_cache(self, cache: Path, expected: list[int]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", HUB_CHILD],
            cwd=ROOT,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        ours, patched = json.loads(done.stdout)
        assert ours["tokens"] == patched["tokens"] == expected
        assert ours["store"] == patched["store"]
        assert ours["store"].startswith(f"checkpoint {cache}")


HUB_CHILD = """
import json, sys
import promoe_triton
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from test_patch import tokens

logging.disable_progress_bar()
done = []
for model in (
    promoe_triton.from_pretrained("some-one/tiny-moe", slots=4),
    promoe_triton.patch(AutoModelForCausalLM.from_pretrained("some-one/tiny-moe"), slots=4),
):
    model.generation_config.eos_token_id = None
    done.append({"tokens": tokens(model), "store": promoe_triton.stats(model).store})
print(json.dumps(done))
"""


class TestFromPretrained:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        build().save_pretrained(tmp_path)
        return tmp_path

    def test_unset_slots_load_everything_that_fits(self, folder: Path, expected: list[int]) -> None:
        model = promoe_triton.from_pretrained(str(folder))
        assert promoe_triton.stats(model).slots == 12
        assert "resident" in promoe_triton.stats(model).store
        assert tokens(model) == expected

    @pytest.mark.parametrize(
        ("dtype", "resident"),
        [("float32", False), (torch.bfloat16, True), ("bfloat16", True), ("auto", False)],
        ids=str,
    )
    def test_what_fits_depends_on_the_dtype(
        self, dtype: Any, resident: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from promoe_triton import loading

        asked = loading.skeleton_of(str(folder), {"dtype": torch.bfloat16})
        assert {parameter.dtype for parameter in asked.parameters()} == {torch.bfloat16}
        monkeypatch.setattr(_rest, "RESERVE", 0)
        free = sum(p.nbytes for p in asked.parameters()) * 3 // 2 + _rest.room_for_context(asked)
        monkeypatch.setattr(budget, "available_memory", lambda: free)
        config = build().config
        before = copy.deepcopy(config)
        skeleton = loading.skeleton_of(str(folder), {"dtype": dtype, "config": config})
        assert loading._everything_fits(skeleton, torch.device("cpu")) is resident
        assert config.dtype == before.dtype, "the caller's configuration is left alone"

    @pytest.mark.parametrize(("spare", "direct"), [(0, False), (-1, True)], ids=["fits", "does-not-fit"])
    def test_the_page_cache_is_used_where_all_fits_beside_the_slots(
        self, spare: int, direct: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        opened: list[bool] = []

        def look(store: Any, memories: Any, direct: bool) -> SlotFiller:
            opened.append(direct)
            return SlotFiller(store, memories, direct)

        monkeypatch.setattr(choice, "SlotFiller", look)
        slots = promoe_triton.stats(promoe_triton.from_pretrained(folder, slots=3, io="buffered")).slot_bytes
        monkeypatch.setattr(choice, "free_memory", lambda: files + slots + spare)
        promoe_triton.from_pretrained(folder, slots=3, io="auto")
        assert opened == [False, direct]

    def test_a_relative_name_outlives_the_working_directory(
        self, folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        model = promoe_triton.from_pretrained(folder.name, slots=2, predictor="none")
        monkeypatch.chdir("/")
        assert tokens(model) == expected
        assert promoe_triton.stats(model).store == f"checkpoint {folder}"

    def test_transformers_own_options_pass_through(self, folder: Path) -> None:
        model = promoe_triton.from_pretrained(
            str(folder), slots=3, dtype=torch.bfloat16, attn_implementation="eager", policy="lfru"
        )
        want = type(build()).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert torch.equal(logits(model), logits(want))

    def test_access_options_reach_every_look_at_the_checkpoint(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoConfig

        from promoe_triton import loading

        seen: dict[str, dict[str, Any]] = {}

        def note(owner: Any, attribute: str, name: str) -> None:
            original = getattr(owner, attribute)

            def noting(*args: Any, **options: Any) -> Any:
                seen[name] = options.copy()
                return original(*args, **options)

            monkeypatch.setattr(owner, attribute, noting)

        note(AutoConfig, "from_pretrained", "configuration")
        note(loading, "resolve_files", "files")
        note(type(build()), "from_pretrained", "dense part")
        promoe_triton.from_pretrained(str(folder), slots=4, token="secret", trust_remote_code=True)
        assert {name for name, options in seen.items() if options["token"] == "secret"} == set(seen)
        assert {name for name, options in seen.items() if options.get("trust_remote_code")} == set(seen) - {"files"}
        assert set(seen) == {"configuration", "files", "dense part"}

    def test_code_of_the_checkpoint_runs_only_if_trusted(self, folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Moe"}}
        (folder / "config.json").write_text(json.dumps(settings))
        with pytest.raises(PromoeError, match="trust_remote_code=True"):
            promoe_triton.from_pretrained(str(folder), slots=4, trust_remote_code=False)

    @pytest.mark.parametrize("slots", [4, None], ids=["few", "all"])
    def test_a_configuration_of_transformers(self, slots: int | None, folder: Path) -> None:
        configuration = build().config
        configuration.num_experts_per_tok = 1
        before = configuration.to_dict()
        want = type(build()).from_pretrained(folder, config=configuration)
        got = promoe_triton.from_pretrained(str(folder), config=configuration, slots=slots)
        assert torch.equal(logits(got), logits(want))
        assert not torch.equal(logits(got), logits(build()))
        assert configuration.to_dict() == before

    @pytest.mark.parametrize("what", ["missing", "file", "configuration", "empty folder"])
    def test_no_checkpoint(self, what: str, folder: Path) -> None:
        path = folder / {"missing": "nowhere", "file": "model.safetensors", "configuration": "config.json"}.get(
            what, "e"
        )
        if what == "empty folder":
            path.mkdir()
        with pytest.raises(PromoeError, match=rf"{path} is no checkpoint: expected a folder with a config\.json"):
            promoe_triton.from_pretrained(str(path), slots=4)

    @pytest.mark.parametrize("name", ["", " "])
    def test_an_empty_name(self, name: str) -> None:
        with pytest.raises(PromoeError, match="name of the checkpoint is empty: expected a folder with a config"):
            promoe_triton.from_pretrained(name, slots=4)

    @pytest.mark.parametrize("name", [None, 5])
    def test_no_name(self, name: Any) -> None:
        with pytest.raises(TypeError, match=f"expected the name of a checkpoint .* got {name}"):
            promoe_triton.from_pretrained(name, slots=4)

    @pytest.mark.parametrize(
        "option",
        [
            "device_map",
            "quantization_config",
            "gguf_file",
            "tp_plan",
            "variant",
            "state_dict",
            "output_loading_info",
        ],
    )
    def test_unsupported_options(self, option: str, folder: Path) -> None:
        with pytest.raises(PromoeError, match=f"does not support {option} yet; leave it out"):
            promoe_triton.from_pretrained(str(folder), slots=4, **{option: "auto"})

    def test_bad_slots_before_anything_is_loaded(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            promoe_triton.from_pretrained("no/such/model", slots=0)

    def test_no_experts(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=9, **settings)).save_pretrained(tmp_path)
        with pytest.raises(PromoeError, match="LlamaForCausalLM has no MoE experts"):
            promoe_triton.from_pretrained(str(tmp_path), slots=4)

    def test_more_slots_than_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

        monkeypatch.setattr(budget, "available_memory", lambda: 10)
        with pytest.raises(PromoeError, match=r"4 slots take .*, but only .* are free"):
            promoe_triton.from_pretrained(str(folder), slots=4)

    def test_a_checkpoint_that_is_asked_for_and_cannot_serve(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {name: t for name, t in load_file(file).items() if "layers.1.block_sparse_moe" not in name}
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(PromoeError, match=r"no tensors for model\.layers\.1\.mlp\.experts"):
            promoe_triton.from_pretrained(str(folder), slots=4, store="checkpoint")

    def test_transformers_is_left_as_it_was(self, folder: Path) -> None:
        """The stand-ins for experts are gone after loading, and after a loading that failed."""
        promoe_triton.from_pretrained(str(folder), slots=4)
        with pytest.raises((ValueError, ImportError), match="nonsense"):
            promoe_triton.from_pretrained(str(folder), slots=4, attn_implementation="nonsense")
        original = build()
        assert type(original.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
        assert sum(describe(module) is not None for module in original.modules()) == 2
        assert "_keys_to_ignore_on_load_unexpected" not in type(original).__dict__
