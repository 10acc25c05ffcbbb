"""Table 2 of the paper in small: tunes every arm of configs/tiny_model/table_2.yaml that names a seed, then compares.

    python recipes/tiny_model/table_2.py                 # all arms, all seeds
    python recipes/tiny_model/table_2.py tune.steps=600  # any key of the config can be overridden

An arm's model is tuned on the arm's compressor from the run's backbone, into the folder that the arm's checkpoint
names. What is tuned already is not tuned again, and what was stopped goes on. Started several times at once (on
several GPUs, say), each process takes the next arm that no other is at; the last one compares.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xcomp.compare.arms import ResolvedArm, resolve_arms
from xcomp.compare.runner import compare
from xcomp.config import Curriculum, Distillation, RunConfig, load_config
from xcomp.run import RunInUse
from xcomp.tuning import tune

# What an arm's tuning has beside its compressor, by words of its name.
MORE = {
    "curriculum": {"curriculum": Curriculum()},
    "distillation": {"distillation": Distillation()},
    "for 1,200 steps": {"steps": 1200},
}


def tune_arms(config: RunConfig, arms: Sequence[ResolvedArm]) -> list[str]:
    """Tune what is not tuned yet; where others are at it, a line each."""
    elsewhere = []
    for arm in sorted(arms, key=lambda arm: arm.seed):  # so that a run that is cut short has whole seeds
        model = Path(arm.backbone["checkpoint"])
        more = next((more for word, more in MORE.items() if word in arm.name), {})
        own = {"compressor": arm.compressor, "seed": arm.seed, "arms": [], "reference": None}
        own |= {"output": str(model.parent.parent), "name": model.parent.name}
        try:
            tune(replace(config, **own, tune=replace(config.tune, **more)))
            print(f"{arm.name}: {model}", flush=True)
        except RunInUse as error:
            elsewhere.append(str(error))
    return elsewhere


def main() -> None:
    config = load_config("tiny_model/table_2", sys.argv[1:])
    arms = [arm for arm in resolve_arms(config) if arm.seed is not None]
    tune_arms(config, arms)
    if elsewhere := tune_arms(config, arms):  # what others were at, they may have ended or left by now
        sys.exit(f"nothing is left to tune here; not compared yet: {'; '.join(elsewhere)}")
    compare(config)


if __name__ == "__main__":
    main()
