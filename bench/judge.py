"""Exact figures of a demo run's models on all sites' test patients: `python bench/judge.py RUN --data DIR`.

For data that may be looked at (public images), outside every privacy claim: the run itself releases only noised sums.
Prints one JSON object: figures by model version, without noise.
"""

import argparse
import json
from pathlib import Path

from training import judge, open_sites

from services.cli.run import load_run
from services.hospital_node.architectures import build
from services.hospital_node.models import layout, read_model_file
from services.hospital_node.training import Compute


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/judge-state"))
    args = parser.parse_args()
    run = load_run(args.run)
    study = run.study.document
    compute = Compute(backbones=args.run / "backbones")
    sites = open_sites(args.data, study, args.state, compute)
    shapes = layout(build(study.model))
    found = {}
    for version in range(run.rounds[-1].result.version + 1):
        vector = read_model_file(run.model(version), shapes)
        found[f"v{version}"] = judge(vector, sites, study, compute)
    print(json.dumps({"model": study.model.architecture, "epsilon": study.privacy.epsilon, "exact": found}, indent=1))


if __name__ == "__main__":
    main()
