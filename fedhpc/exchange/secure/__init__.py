"""Secure aggregation: the server learns the sum of the devices' uploads, and of no upload more than that.

Practical Secure Aggregation for Privacy-Preserving Machine Learning. Bonawitz, Ivanov, Kreuter, Marcedone, McMahan,
Patel, Ramage, Segal, Seth. CCS 2017. https://eprint.iacr.org/2017/281, figure 4 without the parts against active
adversaries: server and devices do what the protocol says, but look at all that passes them. Its rounds are called steps
here, a round being the run's:

- Step 0, `Op.KEYS`: every sampled device draws two pairs of X25519 keys, and sends the public ones.
- Step 1, `Op.SHARES`: it draws the seed b_i of its own mask, and sends t-of-m shares of b_i and of the private key of
  its masks, encrypted for one other device each.
- Step 2, `Op.TRAIN`: it sends its integers plus PRG(b_i), plus PRG(s_ij) for every later device j, minus PRG(s_ij) for
  every earlier one, modulo 2^64. s_ij is what i and j alone can derive from their keys.
- Step 3, `Op.UNMASK`: the server says whose masked integers have come, and passes the encrypted shares on; those
  devices answer with their shares of b_j where j's have come, and of j's private key where they have not.

The shares are passed on in step 3, not in step 2: who is not there any more needs none. All that is secret comes from
the system's source of random numbers, is new in every round and every attempt at one, and is never written to a file.
"""
