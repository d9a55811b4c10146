"""Logits at the end of each text from a backbone and an adapter, without fedhpc: [texts, words] in, [n, words] out."""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

assert "fedhpc" not in sys.modules
_, backbone, adapter = sys.argv
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), adapter).eval()
texts, words = json.load(sys.stdin)
with torch.no_grad():
    logits = [model(torch.tensor([ids])).logits[0, -1, words].tolist() for ids in texts]
json.dump(logits, sys.stdout)
