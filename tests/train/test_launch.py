"""Effects of a launcher's environment and of the caller's torch state on settings and training."""

from __future__ import annotations

import os
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from train_tools import Scenes, collate, run, toy

from fastkd import Distiller
from fastkd._runtime import autocast, pick_precision
from fastkd.train import TrainConfig, launch, segmentation_loss
from fastkd.train.balance import balance_on
from fastkd.train.config import Precision
from fastkd.train.launch import requested

CPU = torch.device("cpu")


def resolve(environ: dict[str, str], **settings: Any) -> tuple[str, str]:
    device, precision = requested(TrainConfig(**settings), environ)
    return str(device), precision


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)


class TestEnvironment:
    def test_accepts_launcher_settings_that_are_defaults_or_agree(self) -> None:
        default = {
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "ACCELERATE_USE_CPU": "False",
            "ACCELERATE_USE_FSDP": "false",
        }
        assert resolve(default, accumulate=4, device="cpu", precision="bf16") == ("cpu", "bf16")
        assert resolve({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, accumulate=4, device="cpu") == ("cpu", "fp32")
        assert resolve({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, device="cpu", compile_student=True) == ("cpu", "fp32")
        assert resolve({"ACCELERATE_MIXED_PRECISION": "bf16"}, device="cpu") == ("cpu", "bf16")
        assert resolve({"ACCELERATE_MIXED_PRECISION": "fp16"}, device="cpu") == ("cpu", "fp16")

    def test_auto_follows_the_requested_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        assert resolve({}) == ("cuda:0", "bf16")
        assert resolve({"ACCELERATE_USE_CPU": "true"}) == ("cpu", "fp32")
        assert resolve({"ACCELERATE_TORCH_DEVICE": "cpu"}) == ("cpu", "fp32")

    @pytest.mark.parametrize(
        ("variable", "value", "settings"),
        [
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {}),
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", {"accumulate": 2}),
            ("ACCELERATE_MIXED_PRECISION", "bf16", {"precision": "fp32"}),
            ("ACCELERATE_MIXED_PRECISION", "fp16", {"precision": "bf16"}),
            ("ACCELERATE_MIXED_PRECISION", "bf16", {"precision": "fp16"}),
            ("ACCELERATE_MIXED_PRECISION", "fp8", {"precision": "bf16"}),
            ("ACCELERATE_USE_CPU", "true", {"device": "cuda"}),
            ("ACCELERATE_TORCH_DEVICE", "cuda:1", {"device": "cpu"}),
            ("ACCELERATE_USE_FSDP", "true", {}),
            ("ACCELERATE_USE_DEEPSPEED", "1", {}),
            ("ACCELERATE_USE_MEGATRON_LM", "true", {}),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}),
            ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}),
            ("ACCELERATE_DYNAMO_BACKEND", "EAGER", {"compile_student": True}),
        ],
    )
    def test_rejects_contradictions(self, variable: str, value: str, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{variable}={value}"):
            resolve({variable: value}, **settings)

    def test_train_and_balance_read_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 contradicts accumulate=1"):
            run(toy(), steps=1)
        with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 contradicts accumulate=1"):
            balance_on(Distiller(toy(), None, segmentation_loss), Scenes(), {}, TrainConfig(device="cpu"))

    def test_gradient_is_not_divided_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = run(toy(), accumulate=4, steps=2, log_every=1).history
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        under = run(toy(), accumulate=4, steps=2, log_every=1).history
        assert [line["gradient_norm"] for line in plain] == [line["gradient_norm"] for line in under]

    def test_rejects_a_world_size_without_joined_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        alone = type("State", (), {"distributed_type": "NO", "num_processes": 1})
        monkeypatch.setattr("accelerate.PartialState", lambda cpu: alone())
        with pytest.raises(ValueError, match="WORLD_SIZE=2, but this process joined no others"):
            launch.join(TrainConfig(device="cpu"))

    def test_each_process_needs_its_own_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = type("State", (), {"distributed_type": "MULTI_CPU", "num_processes": 2, "device": CPU})
        monkeypatch.setattr("accelerate.PartialState", lambda cpu: state())
        assert launch.join(TrainConfig(device="cpu"))[1:] == (CPU, "fp32")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="the 2 processes were joined on cpu, but the configuration has device="):
            launch.join(TrainConfig(device="cuda:1", precision="fp32"))
        state.device = torch.device("cuda", 0)
        with pytest.raises(ValueError, match="device='cuda:1' with 2 processes: each needs its own device"):
            launch.join(TrainConfig(device="cuda:1", precision="fp32"))


class TestPrecision:
    def test_auto_ignores_emulated_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        assert pick_precision("auto", gpu) == "fp32"
        assert pick_precision("bf16", gpu) == "bf16"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of two generations
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
        assert [pick_precision("auto", torch.device("cuda", index)) for index in (0, 1)] == ["fp32", "bf16"]

    def test_settings_and_runtime_have_the_same_precisions(self) -> None:
        for name in get_args(Precision):
            assert pick_precision(name, CPU) == ("fp32" if name == "auto" else name)
        with pytest.raises(ValueError, match="precision must be"):
            pick_precision("fp8", CPU)

    def test_fp32_overrides_an_outer_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            with autocast("fp32", CPU):
                assert toy()(**_inputs()).dtype == torch.float32
            outer = run(toy(), steps=2, log_every=1, precision="fp32").history
        plain = run(toy(), steps=2, log_every=1, precision="fp32").history
        assert [line["loss"] for line in outer] == [line["loss"] for line in plain]
        with autocast("bf16", CPU):
            assert toy()(**_inputs()).dtype == torch.bfloat16


class TestState:
    @pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
    def test_training_ignores_the_caller_state(self, state: Any) -> None:
        plain = run(toy(), steps=2, log_every=1).history
        model, data = toy(), Scenes()
        with state():
            other = run(model, data, steps=2, log_every=1, workers=1).history
        assert [line["loss"] for line in other] == [line["loss"] for line in plain]


def _inputs() -> dict[str, torch.Tensor]:
    batch = collate([Scenes()[0]])
    return {"image": batch["image"], "input_ids": batch["input_ids"]}
