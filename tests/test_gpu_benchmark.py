"""The benchmark measures the published size, and says so where there is no GPU."""

import pytest
import torch

from benchmarks import byte_tokens, gpu


def test_without_memory_it_is_built_in_the_published_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.main(["--meta"])

    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["transformer", "6.155"],  # thousand millions of parameters
        ["text_encoder", "4.022"],
        ["vae", "0.084"],
        ["together", "20.52"],  # GB in bfloat16
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match="This needs a CUDA device"):
        gpu.main([])


def test_prompts_have_about_sixty_tokens_and_are_never_the_same() -> None:
    tokenizer = byte_tokens.tokenizer()
    turns = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": gpu.PROMPT.format(number)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for number in (1, 2)
    ]

    assert turns[0] != turns[1]
    assert {len(tokenizer(each).input_ids) for each in turns} == {62}
