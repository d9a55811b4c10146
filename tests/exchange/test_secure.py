"""Secure aggregation: the sums are those of `reduce` to the bit, and what leaves a rank tells nothing."""

import hmac
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from backbones import make_config
from cryptography.exceptions import InvalidTag
from tiny import KEY_WIDTH, NUM_DEVICES, NUM_TOKENS, final_prompts, metrics

from fedhpc.device import training, worker
from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.secure import ciphers, shamir
from fedhpc.exchange.secure.participants import Participants
from fedhpc.exchange.secure.records import threshold
from fedhpc.exchange.secure.unmasking import unmask
from fedhpc.exchange.simulation import Load, device_seconds

DEVICES, SIZE = list(range(3, 51, 3)), 5000
RANKS = [DEVICES[:7], DEVICES[7:8], DEVICES[8:]]
ALL = {"trace": False, "federation__sample_rate": 1.0, "federation__rounds": 2}


def test_shamir_by_known_answers():
    """The example of https://en.wikipedia.org/wiki/Shamir%27s_secret_sharing: 1234 + 166 x + 94 x^2."""
    shares = {x: shamir.value_at(x, [94, 166, 1234]) for x in range(1, 7)}
    assert list(shares.values()) == [1494, 1942, 2578, 3402, 4414, 5614]
    for places in combinations(shares, 3):
        assert shamir.join([shares[x] for x in places], shamir.weights(places)) == 1234


def test_as_many_shares_as_it_takes_give_the_secret_and_fewer_do_not():
    secret = 2**256 - 1
    shares = shamir.split(secret, 6, 4)
    assert shares != shamir.split(secret, 6, 4)
    for places in combinations(range(1, 7), 4):
        assert shamir.join([shares[x - 1] for x in places], shamir.weights(places)) == secret
    assert shamir.join(shares[:3], shamir.weights([1, 2, 3])) != secret
    many, places = shamir.split(secret, 300, 200), range(300, 100, -1)
    assert shamir.join([many[x - 1] for x in places], shamir.weights(places)) == secret


def test_two_devices_agree_upon_a_key():
    """RFC 7748, section 6.1; HKDF as RFC 5869 has it, by the standard library."""
    alice, bob = (
        ciphers.private_key(bytes.fromhex(private))
        for private in (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        )
    )
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    expected = hmac.digest(hmac.digest(bytes(32), shared, "sha256"), ciphers.MASKS + b"\x01", "sha256")
    for own, other in ((alice, bob), (bob, alice)):
        assert ciphers.agree(own, other.public_key().public_bytes_raw(), ciphers.MASKS) == expected


def test_masks_are_keystreams_whose_blocks_follow_each_other(monkeypatch):
    """RFC 8439, appendix A.1, test vectors 1 and 2: blocks 0 and 1 of the key that is all zeros."""
    words = np.zeros((2, 8), np.uint64)
    ciphers.add_stream(words, bytes(32))
    assert words[0].tobytes().hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert words[1].tobytes().hex().startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")
    monkeypatch.setattr(ciphers, "BLOCK", 3)
    ciphers.add_stream(words, bytes(32), subtract=True)
    assert not words.any()


def test_a_box_is_for_its_receiver_alone():
    key = bytes(range(32))
    box = ciphers.lock(key, 1, 2, b"a share")
    assert ciphers.unlock(key, 1, 2, box) == b"a share"
    assert ciphers.lock(key, 2, 1, b"a share") != box
    for way in ((2, 1, box), (1, 2, box[:-1] + bytes([box[-1] ^ 1]))):
        with pytest.raises(InvalidTag):
            ciphers.unlock(key, *way)


def test_a_third_may_drop_out_but_three_must_be_there():
    assert [threshold(num) for num in (3, 4, 6, 15, 16, 300)] == [3, 3, 4, 10, 11, 200]


class Attempt:
    """One attempt at a round among ranks."""

    def __init__(self):
        self.ranks = [Participants(devices) for devices in RANKS]
        self.keys = gathered(rank.public_keys() for rank in self.ranks)
        self.boxes = gathered(rank.boxes(self.keys) for rank in self.ranks)

    def leaving(self, survivors, exponent):
        """What each rank sends."""
        return [
            rank.masked(terms([d for d in here if d in survivors]), [d for d in here if d in survivors], list).fixed(
                exponent
            )
            for rank, here in zip(self.ranks, RANKS, strict=True)
        ]

    def answers(self, survivors):
        return gathered(rank.answers(self.boxes.view(np.float32), survivors) for rank in self.ranks)


def gathered(parts):
    records = np.concatenate(list(parts))
    return records[np.argsort(records["device"])]


def terms(devices):
    """Two terms of each device: its vector once and so many times as it has examples."""
    drawn = {device: np.random.default_rng(device) for device in devices}
    return Terms(
        coefficients=np.array([(10 + device, 1) for device in devices], np.int64).reshape(-1, 2),
        vectors=[0.01 * rng.standard_normal(SIZE, np.float32) for rng in drawn.values()],
        of=SumSize(num_sums=2, size=SIZE, num_terms=len(DEVICES)),
    )


@pytest.mark.parametrize("dropped", [[], [3], [30, 48], [6, 24, 27], [3, 9, 15, 21], [12, 18, 24, 42, 45]])
def test_the_sum_is_that_of_the_unmasked_integers_whoever_drops_out(dropped):
    survivors = [device for device in DEVICES if device not in dropped]
    expected, attempt = terms(survivors), Attempt()
    total = sum(attempt.leaving(survivors, expected.exponent))
    assert not np.array_equal(total, expected.fixed(expected.exponent))
    unmask(total.view(np.uint64), attempt.keys, attempt.answers(survivors), survivors, list)
    np.testing.assert_array_equal(total, expected.fixed(expected.exponent))


def test_devices_do_not_answer_where_too_few_are_left():
    attempt = Attempt()
    with pytest.raises(RuntimeError, match="sum of 10 of 16 devices"):
        attempt.answers(DEVICES[:10])


def spread(words):
    """Chi-squared of the bytes against all 256 being as likely; 255 and 23 are its mean and deviation then."""
    counts = np.bincount(words.view(np.uint8).reshape(-1), minlength=256)
    return float(np.square(counts - counts.mean()).sum() / counts.mean())


def test_what_leaves_a_rank_cannot_be_told_from_noise_and_is_new_each_time():
    here = terms(RANKS[0])
    assert spread(here.fixed(here.exponent)) > 10_000
    first, second = (Attempt().leaving(DEVICES, here.exponent) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for words in (one, other, one - other):
            assert spread(words) < 255 + 6 * 23


@pytest.fixture
def both(run_config, fedhpc):
    """Runs with `reduce` and `secure` and otherwise the same changes; their configurations and messages."""

    def run(**changes):
        found = []
        for mode in ("reduce", "secure"):
            config = run_config(mode, exchange__mode=mode, **{**ALL, **changes})
            status, _, err = fedhpc("run", config)
            assert status == 0, err
            found.append((config, err))
        return found

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"server__method": "fedavg", "federation__rounds": 1},
        {"simulation": {"drop_out": 0.15}, "device__pack": 2},
    ],
    ids=["fedavg", "two sums, control variates at home, drop-outs"],
)
def test_runs_end_with_the_bits_of_reduce(both, changes):
    (summed, _), (secure, err) = both(**changes)
    assert final_prompts(secure) == final_prompts(summed)
    assert "skipped" not in err
    for ours, theirs in zip(metrics(secure), metrics(summed), strict=True):
        for key in ("loss", "accuracy", "absent", "examples", "update_norm"):
            assert ours[key] == theirs[key]
    if "simulation" in changes:
        assert any(record["absent"] for record in metrics(secure))


@pytest.fixture
def spoil(monkeypatch):
    """From now on the uploads of these devices are not numbers."""
    local_updates = training.local_updates

    def change(*devices):
        def spoiling(*arguments, **named):
            for number, update in local_updates(*arguments, **named):
                bad = np.float32(np.nan if number in devices else 1)
                yield number, replace(update, params=update.params * bad)

        monkeypatch.setattr(training, "local_updates", spoiling)

    return change


def test_a_bad_upload_drops_out_of_the_protocol(both, spoil):
    spoil(3)
    (summed, _), (secure, _) = both(server__method="fedavg", federation__rounds=1)
    assert [bad["device"] for bad in metrics(secure)[0]["rejected"]] == [3]
    assert final_prompts(secure) == final_prompts(summed)


def test_a_round_with_too_few_devices_is_skipped(run_config, fedhpc, spoil):
    """Before it begins where they are known to be absent, after it where their uploads are bad."""
    changes = {"exchange__mode": "secure", "evaluate__every": 4, "server__max_rejected": 0.5, **ALL}
    absent = run_config("absent", **changes | {"simulation": {"drop_out": 0.35}, "federation__rounds": 4})
    status, _, err = fedhpc("run", absent)
    assert status == 0
    there = [NUM_DEVICES - len(record["absent"]) for record in metrics(absent)]
    skipped = [index for index, count in enumerate(there) if count < 8]
    assert 0 < len(skipped) < 4
    for index, record in enumerate(metrics(absent)):
        assert (record["update_norm"] == 0) == (record["steps"] == 0) == (index in skipped)
    assert f"round {skipped[0]} skipped, {there[skipped[0]]} of 12 devices are too few for a sum" in err
    assert "exchange.mode: secure needs 8" in err
    spoil(*range(5))
    bad = run_config("bad", **changes | {"federation__rounds": 1})
    status, _, err = fedhpc("run", bad)
    assert status == 0
    assert "round 0 skipped, 7 of 12 devices are too few for a sum, exchange.mode: secure needs 8: " in err
    assert len(metrics(bad)[0]["rejected"]) == 5


def test_all_sampled_devices_send_keys_and_their_bytes_are_counted(both, monkeypatch):
    """By hand, for 12 devices: keys of 4 + 2 * 32, boxes of 88 for each in 4 more, shares of 36 for each in 4 more."""
    taking_part = []

    class Noted(Participants):
        def __init__(self, devices):
            super().__init__(devices)
            taking_part.append(sorted(devices))

    monkeypatch.setattr(worker, "Participants", Noted)
    (summed, _), (secure, _) = both(simulation={"drop_out": 0.1}, federation__rounds=1)
    n = 2 * 2 * NUM_TOKENS * KEY_WIDTH
    (ours,), (theirs,) = metrics(secure), metrics(summed)
    first, last = 68 + 4 + 12 * 88, 4 + 12 * 36
    up, down = first + 2 * 8 * n + last, 4 * n + 12 * 68 + 4 + 12 * 88
    assert theirs["device_bytes"] == [4 * n, 4 * n]
    assert ours["device_bytes"] == [down, up]
    there = 12 - len(ours["absent"])
    assert there < 12
    assert list(range(12)) in taking_part
    assert ours["bytes"] == 12 * (down + first) + there * (up - first)
    clock = make_config("unused", simulation={"latency_s": 1.0, "step_seconds": 1.0}).simulation
    load = Load(down=down, up=up, trips=ours["device_trips"])
    assert device_seconds(clock, 42, 0, steps=1, load=load) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "trace: true writes each upload; it needs exchange.mode: gather"),
        ({"trace": False, "exchange__encoding": "topk"}, "sums are exact"),
        ({"trace": False, "server__variant": "paper"}, "paper needs each upload"),
        (
            {"trace": False, "federation__sample_rate": 0.2},
            "at least 3 devices a round, and federation.sample_rate",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(run_config, fedhpc, changes, message):
    status, _, err = fedhpc("run", run_config(exchange__mode="secure", **changes))
    assert status == 2
    assert message in err


def test_a_missing_package_is_told_before_anything_begins(run_config, fedhpc, monkeypatch):
    monkeypatch.setattr(ciphers, "find_spec", lambda name: None)
    status, _, err = fedhpc("run", run_config(exchange__mode="secure", trace=False))
    assert status == 2
    assert "exchange.mode: secure needs the package cryptography: pip install 'fedhpc[secure]'" in err
