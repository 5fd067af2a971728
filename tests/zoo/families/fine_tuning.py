"""peft: a small GPT-2 of which only what an adapter adds learns."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import kpflow_dyn as kp

from ..member import Member


def tuned(config: peft.PeftConfig) -> Callable[[], kp.StaticProblem]:
    """The problem of GPT-2 with this adapter, whose own weights are moved off where they start."""

    def problem() -> kp.StaticProblem:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_positions=12, n_embd=16, n_layer=2, n_head=2))
        net = peft.get_peft_model(base, config).double().eval()
        for weight in net.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.3)
        given = {"input_ids": torch.randint(29, (2, 6)), "use_cache": False}
        return kp.StaticProblem(net, given, state="logits", axes=("trial", "time", "unit"))

    return problem


LAYERS = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
PROBLEMS = {
    "LoRA": tuned(peft.LoraConfig(r=2, lora_alpha=4, **LAYERS)),
    "DoRA": tuned(peft.LoraConfig(r=2, use_dora=True, **LAYERS)),
    "IA3": tuned(peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True)),
    "VeRA": tuned(peft.VeraConfig(r=4, **LAYERS)),
    "prompt tuning": tuned(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
}
MEMBERS = [Member(f"peft: {name}", "peft", problem) for name, problem in PROBLEMS.items()]
