"""The ciphers of secure aggregation, all from `cryptography`; nothing else imports it, and nothing before it is needed.

X25519 (RFC 7748) and HKDF with SHA-256 (RFC 5869) for what two devices agree upon, ChaCha20-Poly1305 (RFC 8439) for
shares, the keystream of ChaCha20 for masks.
"""

import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedhpc.errors import ConfigError
from fedhpc.exchange.secure.records import KEY_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

MASKS, SHARES = b"fedhpc secure aggregation: masks", b"fedhpc secure aggregation: shares"
"""What a key is for that two devices agree upon."""
STREAM_START = bytes(16)
"""Counter and nonce of a keystream; every key makes one stream only."""
BLOCK = 1 << 15
"""Words of a keystream that are made at a time: a processor's caches hold them."""


def check_installed() -> None:
    """Raise ConfigError where the package is missing."""
    if find_spec("cryptography") is None:
        raise ConfigError("exchange.mode: secure needs the package cryptography: pip install 'fedhpc[secure]'")


def private_key(private: bytes | None = None) -> "X25519PrivateKey":
    """That of these 32 bytes; a new one, if there are none."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private or secrets.token_bytes(KEY_BYTES))


def agree(private: "X25519PrivateKey", public: bytes, purpose: bytes) -> bytes:
    """The 32 bytes that the owners of two pairs of keys have in common, and nobody else knows."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose).derive(shared)


def lock(key: bytes, sender: int, receiver: int, content: bytes) -> bytes:
    """The box from one device to another; each of the two sends one with a key."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(_nonce(sender, receiver), content, None)


def unlock(key: bytes, sender: int, receiver: int, box: bytes) -> bytes:
    """What is in a box.

    Raises:
        cryptography.exceptions.InvalidTag: it is not what the sender has sent.
    """
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).decrypt(_nonce(sender, receiver), box, None)


def _nonce(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(6, "little") + receiver.to_bytes(6, "little")


def add_stream(words: NDArray[np.uint64], key: bytes, *, subtract: bool = False) -> None:
    """Add a key's keystream to contiguous words, or take it away, modulo 2^64."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    stream, flat = Cipher(ChaCha20(key, STREAM_START), mode=None).encryptor(), words.reshape(-1)
    zeros, made = np.zeros((2, min(BLOCK, flat.size)), "<u8")
    for first in range(0, flat.size, BLOCK):
        block = flat[first : first + BLOCK]
        stream.update_into(zeros[: block.size].data.cast("B"), made.data.cast("B"))
        (np.subtract if subtract else np.add)(block, made[: block.size], out=block)
