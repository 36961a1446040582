"""A small byte-level tokenizer, made here, with the chat templates of several families."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "What does it do?\n\nIt returns the sum of the values.\n\n\n",
    "user\nassistant\nsystem\n  indented  words\n",
    "<|im_start|>assistant\n\nHello there.",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]

TEMPLATES = {
    # Qwen 2.5, SmolLM2 (which puts a system message in front)
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Llama 3: the template writes BOS, and trims
    "header": (
        "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n"
        "{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    # Phi 3: an end-of-text token after the last turn only
    "end_of_text": (
        "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% else %}</s>{% endif %}"
    ),
    # Qwen 3: an empty thought in front of the last answer only
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Llama 2: no tokens for roles
    "instruction": (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
}


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def with_template(backend: Tokenizer, template: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,  # on plain text; a template that writes one must not get a second
        chat_template=TEMPLATES[template],
    )


@pytest.fixture(scope="session")
def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return with_template(backend, "chatml")
