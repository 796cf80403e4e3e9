"""A head's weight over three decades: with `balance: auto` the toy converges at all of them, without it does not."""

from __future__ import annotations

import pytest

from distill import config, run
from distill.session import assemble
from test_contract import ROOT

SMALL = (
    "log.wandb=disabled", "train.threads=1", "train.steps=600", "method.warm_start=200", "data.batch_size=128",
    "roles.student.net.width=64", "method.grid=1", "method.student_every=1",
)  # fmt: skip
