"""What `benchmarks/flower.py` starts in the environment that has Flower: rounds of a simulation with idle clients.

    python benchmarks/flower_round.py --json FILE [--clients 16] [--floats 655360] [--rounds 14]

A client makes an array of the parameters that it gets and sends it back. FILE gets the seconds from each round to the
next.
"""

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import flwr
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()


@client.train()
def train(message, _context):
    params = message.content["arrays"].to_numpy_ndarrays()
    reply = {"arrays": ArrayRecord(params), "metrics": MetricRecord({"num-examples": 64})}
    return Message(content=RecordDict(reply), reply_to=message)


class TimedFedAvg(FedAvg):
    """Notes when each round begins; a client that fails ends the run."""

    def __init__(self, clients):
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.clients, self.began = clients, []

    def configure_train(self, *arguments):
        self.began.append(time.perf_counter())
        return super().configure_train(*arguments)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if sum(reply.has_content() for reply in replies) != self.clients:
            raise RuntimeError(f"round {server_round}: not all of {self.clients} clients replied")
        return super().aggregate_train(server_round, replies)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--floats", type=int, default=655360)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    arguments = parser.parse_args()
    strategy = TimedFedAvg(arguments.clients)
    params = np.random.default_rng(0).normal(size=arguments.floats).astype(np.float32)
    server = ServerApp()

    @server.main()
    def run(grid, _context):
        result = strategy.start(grid, ArrayRecord([params]), num_rounds=arguments.rounds)
        (found,) = result.arrays.to_numpy_ndarrays()
        np.testing.assert_allclose(found, params, rtol=1e-5)

    actors = min(len(os.sched_getaffinity(0)), arguments.clients)
    backend = {
        "init_args": {"num_cpus": actors, "num_gpus": 0, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, client, num_supernodes=arguments.clients, backend_config=backend)
    seconds = [after - before for before, after in pairwise(strategy.began)]
    arguments.json.write_text(json.dumps({"version": flwr.__version__, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
