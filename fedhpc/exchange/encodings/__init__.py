"""The upload encodings that fedhpc brings, a file each."""

from fedhpc.exchange.encodings import dense, topk  # noqa: F401
