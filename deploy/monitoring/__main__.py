"""`python -m deploy.monitoring`: compile dashboards and alert rules into the charts' files (`make charts` does it)."""

from pathlib import Path

from deploy.monitoring.build import write

if __name__ == "__main__":
    for path in write():
        print(f"made {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
