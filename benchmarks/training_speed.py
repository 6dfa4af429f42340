"""How much the shared prompt pass saves: DPO's forward and backward pass, both ways in one run.

    make bench

Grouped: a prompt goes through the model once for all its responses. Apart: every response brings its own
copy of the prompt, as in a trainer of pairs. Same model, same tokens, same gradient; the two take turns,
and the median of the ratios is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cdpo_core.models.logprobs import response_log_probs

VOCABULARY, PAD = 600, 0
# (what, width, layers, prompt tokens, response tokens)
SHAPES = (("testbed", 64, 2, 8, 7), ("chat turn", 128, 4, 64, 64))


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--responses", type=int, default=16, help="responses of each prompt")
    parser.add_argument("--turns", type=int, default=7, help="turns of each way")
    options = parser.parse_args()
    print(f"{options.prompts} prompts x {options.responses} responses a step, {torch.get_num_threads()} threads")
    for name, width, layers, prompt, response in SHAPES:
        model = _model(width, layers)
        step = _tokens(options.prompts, options.responses, prompt, response)
        turns = [(_grouped(model, *step), _apart(model, *step)) for _ in range(options.turns + 1)][1:]
        grouped, apart = (statistics.median(side) for side in zip(*turns, strict=True))
        ratio = statistics.median(slow / fast for fast, slow in turns)
        print(f"{name:10} grouped {1000 * grouped:7.1f} ms   apart {1000 * apart:7.1f} ms   ratio {ratio:.2f}")


def _model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def _tokens(prompts: int, size: int, prompt: int, response: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, VOCABULARY, (prompts, prompt), generator=generator).tolist()
    answers = torch.randint(3, VOCABULARY, (prompts, size, response), generator=generator).tolist()
    return texts, answers


def _grouped(model: LlamaForCausalLM, prompts: list[list[int]], responses: list[list[list[int]]]) -> float:
    return _seconds(model, prompts, responses)


def _apart(model: LlamaForCausalLM, prompts: list[list[int]], responses: list[list[list[int]]]) -> float:
    copies = [prompt for prompt, group in zip(prompts, responses, strict=True) for _ in group]
    return _seconds(model, copies, [[answer] for group in responses for answer in group])


def _seconds(model: LlamaForCausalLM, prompts: list[list[int]], responses: list[list[list[int]]]) -> float:
    model.zero_grad()
    started = time.perf_counter()
    response_log_probs(model, prompts, responses, PAD).sum().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
