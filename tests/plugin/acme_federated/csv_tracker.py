"""Round and loss as lines of a CSV file."""

import fedhpc


@fedhpc.register_tracker("csv")
class CsvTracker(fedhpc.Tracker):
    """Writes into the run directory."""

    class Config(fedhpc.TrackerConfig):
        """Keys."""

        file: str = "rounds.csv"
        """Its name."""

    def begin(self, run, run_dir, earlier):
        """Rounds before are there already."""
        self.path = run_dir / self.config.file
        if not earlier:
            self.path.write_text(f"round,loss of {run.server.method}\n")

    def record(self, metrics):
        """A line."""
        with self.path.open("a") as file:
            file.write(f"{metrics['round']},{metrics['loss']}\n")
