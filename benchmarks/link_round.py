"""The ranks of `links.py`: rounds of idle devices, one on each rank but the first, and raw rounds of the same bytes.

    mpirun -np 4 python benchmarks/link_round.py --mbit 100 --rounds 8 --folder FOLDER --json FILE

It changes no link. FOLDER is one that all ranks see; FILE gets a row for every way to exchange.
"""

import argparse
import json
import statistics
from pathlib import Path

from round import WARM, StandIn, engine_rounds, raw_rounds

from fedhpc.config import SimulationConfig
from fedhpc.device import training
from fedhpc.exchange import MpiExchange
from fedhpc.exchange.simulation import round_seconds
from fedhpc.job.log import start_log
from fedhpc.job.stopping import StopRequest

WAYS = ("gather", "reduce", "16 bits")
LAYERS = {"all": 1.0, "half": 0.5}
FLOAT_BYTES = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, required=True, help="of each device's link, as it is")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    start_log(0, 1, "benchmark")
    training.local_updates = stand_in = StandIn()
    exchange = MpiExchange(StopRequest())
    comm = exchange._mpi.COMM_WORLD
    clock = SimulationConfig(down_mbit=arguments.mbit, up_mbit=arguments.mbit)
    rows = []
    for layers, ratio in LAYERS.items():
        for way in WAYS:
            place = arguments.folder / f"{layers} {way}"
            seconds, records = engine_rounds(
                exchange, stand_in, place, rounds=arguments.rounds + WARM + 1, way=way, ratio=ratio
            )
            sizes = [nbytes // FLOAT_BYTES for nbytes in comm.bcast(records[-1]["device_bytes"] if records else None)]
            raw = raw_rounds(comm, *sizes, arguments.rounds + WARM)
            if exchange.rank == 0:
                rows.append(
                    {
                        "layers": layers,
                        "way": way,
                        "device_bytes": records[-1]["device_bytes"],
                        "seconds": statistics.median(seconds),
                        "raw_s": statistics.median(raw),
                        "clock_s": statistics.median(round_seconds(clock, 0, record) for record in records),
                        "parts": {
                            name: statistics.median(record["seconds"][name] for record in records)
                            for name in ("broadcast", "local", "gather", "server")
                        },
                    }
                )
    if exchange.rank == 0:
        arguments.json.write_text(json.dumps(rows))
    exchange.finalize()


if __name__ == "__main__":
    main()
