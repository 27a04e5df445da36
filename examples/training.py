"""What the training examples share: training several models side by side, batches, loss curves, times.

Models that differ in their attention alone are trained step by step in turn, on the same batches and with the
same dropout masks, so that their losses can be compared number by number and whatever else the machine does
hits them alike.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from minilm import HERE, at_least_one
from torch import nn
from tqdm import tqdm

COMPARED = 20  # steps over which the losses of two attentions must agree
COLOURS = {"sdpa": ("tab:orange", 4.0), "fastattn": ("black", 1.2)}  # a thin line upon a thick one


class Curve(NamedTuple):
    losses: list[float]
    seconds: list[float]  # of each step: forward, backward, optimizer


def batches_of_alike_lengths(lengths, size, generator):
    """Batches of indices for one epoch, in random order; alike lengths lie together, for little padding."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 16 * size  # sorted only within a pool: an epoch never has the batches of the one before
    batches = []
    for start in range(0, len(order), pool):
        chosen = sorted(order[start : start + pool], key=lambda n: lengths[n])
        batches += [chosen[n : n + size] for n in range(0, len(chosen), size)]
    return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]


def padded(rows, fill):
    """Lists of numbers to a tensor (B,S), filled up at the end."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def train(models, batches, loss_of, make_optimizer, factor, seed=0):
    """Trains all models on the same batches; {name: Curve}.

    models: {name: module}. loss_of(model, batch) gives the loss; make_optimizer(model) an optimizer, whose
    learning rate is multiplied by factor(step), steps counted from 0.
    """
    optimizers = {name: make_optimizer(model) for name, model in models.items()}
    schedules = {
        name: torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for name, optimizer in optimizers.items()
    }
    curves = {name: Curve([], []) for name in models}
    for model in models.values():
        model.train()
    with tqdm(batches, desc=" and ".join(models), unit=" steps", file=sys.stderr) as bar:
        for step, batch in enumerate(bar):
            names = list(models) if step % 2 else list(reversed(models))  # none is always the first
            for name in names:
                torch.manual_seed(1_000_003 * seed + step)  # the same dropout for all
                start = time.perf_counter()
                loss = loss_of(models[name], batch)
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
                schedules[name].step()
                curves[name].seconds.append(time.perf_counter() - start)
                curves[name].losses.append(loss.item())
            bar.set_postfix_str(" ".join(f"{name} {curves[name].losses[-1]:.3f}" for name in models))
    return curves


def largest_difference(curves, steps=COMPARED):
    """How far the losses of any two models are apart at most in the first steps."""
    losses = [curve.losses[:steps] for curve in curves.values()]
    return max(max(step) - min(step) for step in zip(*losses, strict=True))


def print_summary(curves):
    """Time per step and loss of each attention, side by side."""
    steps = len(next(iter(curves.values())).losses)
    print(f"\n{'attention':<10}{'time per step':>14}{'first loss':>12}{'last loss':>12}   ({steps} steps)")
    for name, curve in curves.items():
        last = sum(curve.losses[-COMPARED:]) / len(curve.losses[-COMPARED:])
        print(f"{name:<10}{1e3 * median(curve.seconds):>11.1f} ms{curve.losses[0]:>12.4f}{last:>12.4f}")
    if len(curves) == 2:
        ours, theirs = (median(curve.seconds) for curve in curves.values())
        names = " / ".join(curves)
        print(f"time per step, {names}: {ours / theirs:.3f} (medians of steps taken in turn)")
        print(f"losses of the first {COMPARED} steps: at most {largest_difference(curves):.1e} apart")


def plot_losses(path, curves, title):
    """The loss of each step, all attentions in one picture; below it how far two of them are apart."""
    from matplotlib.figure import Figure

    both = len(curves) == 2
    figure = Figure(figsize=(8, 6 if both else 4.5), dpi=150, layout="constrained")
    panels = figure.subplots(1 + both, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + both])[:, 0]
    for name in sorted(curves, key=list(COLOURS).index):
        colour, width = COLOURS[name]
        panels[0].plot(curves[name].losses, color=colour, linewidth=width, label=name)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)
    panels[0].set_title(title, fontsize=11)
    if both:
        first, second = (curve.losses for curve in curves.values())
        apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
        shown = [a or math.nan for a in apart]  # exact agreement has no logarithm
        panels[1].plot(shown, ".", color="tab:blue", markersize=3)
        panels[1].axvspan(0, COMPARED - 1, color="0.9")
        place = {"transform": panels[1].get_xaxis_transform(), "va": "top", "fontsize": 8}
        panels[1].text(0, 0.98, f"first {COMPARED} steps", **place)
        panels[1].set_yscale("log")
        panels[1].set_ylabel("difference of the losses")
    for axes in panels:
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.savefig(path)


def above_zero(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parser_of(description, **defaults):
    """The options that both examples have; defaults: of epochs, batch_size, sentences, lr."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    what = "whose attention to train with; both: the same model twice, step by step in turn (default: both)"
    add("--attention", choices=["fastattn", "sdpa", "both"], default="both", help=what)
    what = {
        "epochs": "passes over the training sentences",
        "batch_size": "sentences of a step",
        "sentences": "training sentences to make",
        "test_sentences": "test sentences to make, of each kind",
        "lr": "highest learning rate",
    }
    for name, default in defaults.items():
        kind = above_zero if isinstance(default, float) else at_least_one
        text = f"{what[name]} (default: %(default)s)"
        letter = "N" if kind is at_least_one else "X"
        add(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=letter, help=text)
    what = "of corpus, model and batches (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=what)
    what = "folder for the pictures (default: %(default)s)"
    add("--out", type=Path, default=HERE / "output", metavar="DIR", help=what)
    return parser


def attentions(choice):
    """The names behind --attention."""
    return ["fastattn", "sdpa"] if choice == "both" else [choice]
