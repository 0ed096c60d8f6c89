"""Tokens per second of the float32 forward on the CPU beside transformers' Mamba, same weights, same tokens."""

from __future__ import annotations

import logging

import torch
from timing import alternate, table
from transformers import MambaConfig as HFConfig
from transformers import MambaForCausalLM

from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.packed_batch import Batch
from quambase.model.weights import random_weights, tensors_of

logging.getLogger("transformers").setLevel(logging.ERROR)

SHAPES = {
    "7 M shape, 8 x 512": (MambaConfig(256, 12, 8192, 512, dt_rank=16), 8, 512),
    "mamba-130m shape (random weights), 2 x 512": (MambaConfig(768, 24, 50280, 1536, dt_rank=48), 2, 512),
}


def main() -> None:
    """Print one table per shape."""
    for title, (config, documents, length) in SHAPES.items():
        weights = random_weights(config)
        tokens = torch.randint(0, config.vocab_size, (documents, length), generator=torch.Generator().manual_seed(0))
        batch = Batch.pack(tokens.tolist())
        ours = floating_model(weights)
        theirs = MambaForCausalLM(
            HFConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layer,
                time_step_rank=config.dt_rank,
            )
        ).eval()
        state = {k.replace("embedding.weight", "embeddings.weight"): v for k, v in tensors_of(weights).items()}
        theirs.load_state_dict(state | {"lm_head.weight": weights.lm_head})

        def run_ours(model: LanguageModel = ours, packed: Batch = batch) -> torch.Tensor:
            return model.logits(model.hidden(packed))

        def run_theirs(model: MambaForCausalLM = theirs, ids: torch.Tensor = tokens) -> torch.Tensor:
            with torch.inference_mode():
                return model(ids).logits

        apart = (run_ours().view(documents, length, -1) - run_theirs()).abs().max()
        seconds = alternate({"transformers": run_theirs, "quambase": run_ours}, repeats=2)
        count = documents * length
        table(title, "tokens/s", {name: count / s for name, s in seconds.items()}, "transformers")
        print(f"largest difference of a logit: {float(apart):.2g}")


if __name__ == "__main__":
    main()
