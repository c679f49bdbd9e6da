"""What the engines that draw their tokens themselves, from a distribution over the whole vocabulary, can be asked for."""

from __future__ import annotations

DRAWS_TOKENS = frozenset(
    {
        "ignore_eos",
        "logit_bias",
        "logprobs",
        "min_p",
        "min_tokens",
        "n",
        "prompt_logprobs",
        "repetition_penalty",
        "resume",
        "seed",
        "stop_token_ids",
        "tokens",
        "top_k",
    }
)
