#!/usr/bin/env python3
"""Computes the golden vectors beside this script a second time and compares.

    pip install torch safetensors
    tests/golden/check.py

Float64 throughout. The model and the optimizer are spelled out in elementary operations, in the
naive form of the formulas (products of survival probabilities, explicit softmax, AdamW by hand), so
that a slip in the implementation that made the vectors would show here. Exits with status 1 when
any vector is off by more than 1e-9, relative in the Euclidean norm.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).parent
TOLERANCE = 1e-9


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x, theta):
    """Rotary embedding of x [batch, heads, time, width]: pairs (i, i + width/2)."""
    time, width = x.shape[-2:]
    half = width // 2
    frequency = theta ** (-2.0 * torch.arange(half, dtype=torch.float64) / width)
    angle = torch.arange(time, dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


def attention(x, weights, prefix, heads, theta):
    batch, time, width = x.shape

    def project(name):
        y = x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
        return y.reshape(batch, time, heads, width // heads).permute(0, 2, 1, 3)

    q, k, v = rotated(project("q"), theta), rotated(project("k"), theta), project("v")
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf).exp()
    mixed = (scores / scores.sum(-1, keepdim=True)) @ v
    mixed = mixed.permute(0, 2, 1, 3).reshape(batch, time, width)
    return mixed @ weights[f"{prefix}self_attn.o_proj.weight"].T


def feed_forward(x, weights, prefix):
    gate = x @ weights[f"{prefix}mlp.gate_proj.weight"].T
    up = x @ weights[f"{prefix}mlp.up_proj.weight"].T
    return (gate / (1 + (-gate).exp()) * up) @ weights[f"{prefix}mlp.down_proj.weight"].T


def stage_one(weights, case, tokens, targets):
    """The Stage I loss and what it is made of; lists run over the loops."""
    hidden = weights["model.embed_tokens.weight"][tokens]
    logits, gates, losses = [], [], []
    for _ in range(case["loops"]):
        for layer in range(case["layers"]):
            prefix = f"model.layers.{layer}."

            def scale(name, prefix=prefix):
                return weights[f"{prefix}{name}.weight"]

            mixed = attention(
                norm(hidden, scale("input_layernorm")), weights, prefix, case["heads"], case["theta"]
            )
            hidden = hidden + norm(mixed, scale("input_layernorm_2"))
            fed = feed_forward(norm(hidden, scale("post_attention_layernorm")), weights, prefix)
            hidden = hidden + norm(fed, scale("post_attention_layernorm_2"))
        hidden = norm(hidden, weights["model.norm.weight"])
        gate = hidden @ weights["model.early_exit_gate.weight"][0]
        gates.append(gate + weights["model.early_exit_gate.bias"])
        logits.append(hidden @ weights["lm_head.weight"].T)
        chosen = logits[-1].gather(-1, targets[..., None])[..., 0]
        losses.append(logits[-1].exp().sum(-1).log() - chosen)

    exits, staying = [], torch.ones_like(losses[0])
    for gate in gates[:-1]:
        leave = 1 / (1 + (-gate).exp())
        exits.append(staying * leave)
        staying = staying * (1 - leave)
    exits.append(staying)
    expected = sum(p * ce for p, ce in zip(exits, losses))
    entropy = -sum(p * p.log() for p in exits)
    loss = (expected - case["beta"] * entropy).mean()
    return loss, {"ce": losses, "gate_logits": gates, "exit_pdf": exits, "logits": logits}


class Comparison:
    def __init__(self):
        self.worst, self.count = 0.0, 0

    def add(self, what, found, expected):
        found = torch.as_tensor(found, dtype=torch.float64).detach()
        expected = torch.as_tensor(expected, dtype=torch.float64)
        off = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        self.worst, self.count = max(self.worst, off), self.count + 1
        if not off <= TOLERANCE:
            sys.exit(f"{what}: off by {off:.1e}")


def check_case(name):
    folder, compare = HERE / name, Comparison()
    case = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    weights = {k: v.requires_grad_() for k, v in load_file(folder / "weights.safetensors").items()}
    loss, parts = stage_one(weights, case, expected["tokens"], expected["targets"])
    compare.add(f"{name}: loss", loss, expected["loss"])
    for key in ("ce", "gate_logits", "exit_pdf"):
        compare.add(f"{name}: {key}", torch.stack(parts[key]), expected[key])
    for index, logits in enumerate(parts["logits"]):
        compare.add(f"{name}: logits {index}", logits, expected[f"logits.{index}"])
    loss.backward()
    for key, weight in weights.items():
        # The gate of a single loop decides nothing.
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        compare.add(f"{name}: gradient of {key}", found, expected[f"grad.{key}"])
    print(f"{name}: {compare.count} vectors agree within {compare.worst:.0e}")


def check_steps():
    folder, compare = HERE / "steps", Comparison()
    record = json.loads((folder / "steps.json").read_text())
    case, batches = record["config"], load_file(folder / "batches.safetensors")
    weights = load_file(folder / "initial.safetensors")
    first = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    second = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for row in record["steps"]:
        step = row["step"]
        leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
        loss, _ = stage_one(leaves, case, batches[f"tokens.{step}"], batches[f"targets.{step}"])
        loss.backward()
        length = sum(leaf.grad.square().sum() for leaf in leaves.values()).sqrt()
        compare.add(f"step {step}: loss", loss, row["loss"])
        compare.add(f"step {step}: gradient norm", length, row["grad_norm"])
        clip = min(1.0, 1.0 / (float(length) + 1e-6))
        for key, leaf in leaves.items():
            gradient = leaf.grad * clip
            first[key] = 0.9 * first[key] + 0.1 * gradient
            second[key] = 0.95 * second[key] + 0.05 * gradient.square()
            mean = first[key] / (1 - 0.9 ** (step + 1))
            deviation = (second[key] / (1 - 0.95 ** (step + 1))).sqrt()
            matrix = key.startswith("model.layers.") and leaf.dim() == 2 or key == "lm_head.weight"
            decay = 0.1 if matrix else 0.0
            weights[key] = weights[key] * (1 - case["lr"] * decay)
            weights[key] = weights[key] - case["lr"] * mean / (deviation + 1e-8)
    for key, weight in load_file(folder / "final.safetensors").items():
        compare.add(f"final {key}", weights[key], weight)
    print(f"steps: {len(record['steps'])} steps of AdamW agree within {compare.worst:.0e}")


if __name__ == "__main__":
    for path in sorted(HERE.glob("*/case.json")):
        check_case(path.parent.name)
    check_steps()
