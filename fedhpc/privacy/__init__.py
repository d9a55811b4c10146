"""Client-level differential privacy: what leaves the server hardly depends on any one device."""

from fedhpc.privacy.mechanism import Mechanism, make_mechanism

__all__ = ["Mechanism", "make_mechanism"]
