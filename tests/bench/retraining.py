"""Two domains retrained twice each on a tiny network of ImageNet photographs: what it gains, and what it forgets.

    .venv/bin/python -m tests.bench.retraining FOLDER [STAGE ...]      stages: champion text charts report

Everything is left in FOLDER, and each stage is a command that continues where it stopped. Needs ../shared/data.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_prep.sources import list_items
from pipeline import tracking
from pipeline.ledger import Ledger
from tests.domains import let_arrive, mean_psnr_y
from tests.shared_data import ROOT, SHARED

NETWORK = {"embed_dim": 24, "depths": [2], "num_heads": [4], "window_size": 8, "compress_ratio": 4, "squeeze_factor": 6}
FAST = {
    **{"global_batch": 8, "patch_px": 32, "warmup_steps": 30, "log_every": 50, "checkpoint_every": 100},
    "cache_decoded_bytes": 200_000_000,
}
ARRIVALS, MARGIN_DB, TOLERANCE_DB = (range(48), range(48, 96)), 0.05, 0.3
DOMAINS, MODEL = ("text", "charts"), "general-x2"


def hatchery(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], cwd=ROOT, check=True)


def train_champion(folder: Path) -> None:
    """A general network of 300 photographs: 500 steps from the bicubic start."""
    photographs = [item.uri for item in list_items(str(SHARED / "data/imagenet-sample/train"))][:300]
    (folder / "photographs.txt").write_text("\n".join(photographs))
    recipe: dict[str, Any] = {
        "name": "general",
        "storage": {"uri": f"{folder}/runs"},
        "compute": {"num_workers": 2, "micro_batch": 4},
        "model": {"arch": "hat", "options": NETWORK},
        "data": {"imagenet": {"source": f"{folder}/photographs.txt", "samples_per_shard": 64, "max_reject_share": 0.5}},
        "phases": {"pretrain": {"data": "imagenet", "steps": 500, "lr": 1e-3, "milestones": [350, 450], **FAST}},
        "trainings": {"pretrain-x2": {"scale": 2, "phase": "pretrain", "start": "bicubic"}},
        "evaluate": {"sets": {"Set5": f"{SHARED}/data/benchmark/Set5"}},
        "registry": {"name": "general", "gate": {"better": {"Set5": 0.0}}},
    }
    recipe["phases"]["pretrain"]["ema_decay"] = 0.98
    (folder / "general.yaml").write_text(yaml.safe_dump(recipe))
    hatchery("pretrain", "--recipe", f"{folder}/general.yaml")


def retrain(folder: Path, domain: str) -> None:
    """Two retrainings, new images arriving before each; a third call finds nothing new."""
    config: dict[str, Any] = {
        "name": domain,
        "source": f"{folder}/incoming-{domain}",
        "base": "models:/general-x2@champion",
        "min_new_images": 40,
        "hold_out_share": 0.2,
        "replay": {"source": f"{folder}/photographs.txt", "share": 0.8},
        "max_reject_share": 0.5,
        "training": {"steps": 200, "lr": 1e-4, "milestones": [120, 170], "ema_decay": 0.95, **FAST},
        "evaluate": {"sets": {"Set5": f"{SHARED}/data/benchmark/Set5"}},
        "gate": {"better": {domain: MARGIN_DB}, "not_worse": {"Set5": TOLERANCE_DB}, "decide_by": "mean"},
        "storage": {"uri": f"{folder}/runs"},
        "compute": {"num_workers": 2, "micro_batch": 4},
    }
    (folder / f"{domain}.yaml").write_text(yaml.safe_dump(config))
    for arrived in ARRIVALS:
        let_arrive(domain, folder / f"incoming-{domain}", arrived)
        hatchery("retrain", f"{folder}/{domain}.yaml")
    hatchery("retrain", f"{folder}/{domain}.yaml")


def report(folder: Path) -> None:
    """The registry's history, and a table of every round against the general champion, on today's hold-outs."""
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    hatchery("history", MODEL, "--tracking-uri", uri)
    client = tracking.connect_default(uri)
    general = client.get_model_version(MODEL, "1")
    set5 = f"{SHARED}/data/benchmark/Set5"
    print("| domain | round | trained on / held out | version | promoted | hold-out, gain in dB | Set5, change in dB |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for domain in DOMAINS:
        ledger = Ledger(f"{folder}/runs", domain)
        before = {uri: mean_psnr_y(general, uri) for uri in (ledger.hold_out_uri, set5)}
        for entry in ledger.rounds():
            if (outcome := ledger.outcome(entry.number)) is None:
                continue
            version = client.get_model_version(MODEL, outcome["version"])
            gains = " | ".join(f"{mean_psnr_y(version, uri) - figure:+.3f}" for uri, figure in before.items())
            roles = [image.role for image in entry.images]
            images = f"{roles.count('train')} / {roles.count('hold-out')}"
            promoted = "yes" if outcome["promoted"] else "no"
            print(f"| {domain} | {entry.number} | {images} | {version.version} | {promoted} | {gains} |")


def main() -> None:
    folder, stages = Path(sys.argv[1]).absolute(), sys.argv[2:] or ["champion", *DOMAINS, "report"]
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if stage == "champion":
            train_champion(folder)
        elif stage == "report":
            report(folder)
        else:
            retrain(folder, stage)


if __name__ == "__main__":
    main()
