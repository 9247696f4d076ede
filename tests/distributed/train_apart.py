"""`peft-safety` where the second process finds another model under the same name, as a node with its own disk may.

accelerate launch ... tests/distributed/train_apart.py train --config FILE
"""

from __future__ import annotations

import os

from peft_safety.cli import app
from peft_safety.recipes.job import digests

if os.environ["RANK"] != "0":
    digests.own_version = lambda name: ("another", name)
app()
