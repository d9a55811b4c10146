"""How long a round takes over links of 100 Mbit/s and 1 Gbit/s, beside raw MPI and beside the simulated clock.

    python benchmarks/links.py [--mbit 100 1000] [--rounds 8] [--json FILE]

As root: every rank is on an emulated host of its own (tests/hosts/hosts.py); the three devices' links carry so many
megabits a second each way, the server's as many as it can. All layers of RoBERTa large's prompts or half of them go
down and up, gathered, added up on the way, or in 16 bits; the local work is nothing at all. Beside each way stand
mpi4py's `Bcast` and `Gatherv` of a device's bytes, and what the simulated clock says of such devices
(`simulation.down_mbit`, `simulation.up_mbit`). Figures are medians over the rounds.

The clock is of devices that send an upload each. Those that are added up on the way are not that to these links: a sum
has 16 bytes for each number, and passes from host to host before it comes to the server.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/hosts"))
from hosts import Hosts, why_not  # noqa: E402

DEVICES = 3
LIMIT_S = 900
COLUMNS = "Mbit/s  layers  way      down MB  up MB   ms a round  raw ms  / raw  clock ms  off by"


def measure(hosts, mbit, rounds):
    """A row for every way to exchange."""
    for host in hosts.names[1:]:
        hosts.shape(host, mbit)
    folder = hosts.folder / f"{mbit:g}"
    folder.mkdir()
    file = folder / "rows.json"
    program = [sys.executable, ROOT / "benchmarks/link_round.py", "--mbit", mbit, "--rounds", rounds]
    slots = [1] * len(hosts.names)
    hosts.run(
        "node1",
        *hosts.mpirun(slots, "-np", len(slots), *program, "--folder", folder, "--json", file),
        timeout_s=LIMIT_S,
    )
    return [{"mbit": mbit, **row, "off": row["clock_s"] / row["seconds"] - 1} for row in json.loads(file.read_text())]


def line(row):
    down, up = (nbytes / 1e6 for nbytes in row["device_bytes"])
    return (
        f"{row['mbit']:6g}  {row['layers']:6s}  {row['way']:7s}  {down:7.2f}  {up:5.2f}  {1e3 * row['seconds']:11.1f}"
        f"  {1e3 * row['raw_s']:6.1f}  {row['seconds'] / row['raw_s']:5.2f}  {1e3 * row['clock_s']:8.1f}"
        f"  {100 * row['off']:+5.1f}%"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 1000], help="of each device's link")
    parser.add_argument("--rounds", type=int, default=8, help="of each way")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # still end what was started
    rows = []
    with tempfile.TemporaryDirectory() as folder, Hosts(folder, 1 + DEVICES) as hosts:
        print(COLUMNS)
        for mbit in arguments.mbit:
            rows += measure(hosts, mbit, arguments.rounds)
            print("\n".join(line(row) for row in rows[-6:]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
