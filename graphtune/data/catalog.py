"""Well-known data sets: a builder and what to tell it, each of which a config may override.

    dataset: {_component_: graphtune.data.samsum, split: "train[:90%]", max_length: 2048}

They are read from the Hugging Face hub; whoever publishes them there has other names for some
columns, and has moved some.
"""

from functools import partial

from graphtune.data.builders import alpaca, chat, instruct, preference, questions, text

alpaca_cleaned = partial(alpaca, source="yahma/alpaca-cleaned")

grammar = partial(
    instruct,
    source="liweili/c4_200m",
    prompt_column="input",
    response_column="output",
    template="grammar",
)

# Samsung took its own copy off the hub.
samsum = partial(
    instruct,
    source="knkarthick/samsum",
    prompt_column="dialogue",
    response_column="summary",
    template="summarize",
)

slimorca = partial(chat, source="Open-Orca/SlimOrca-Dedup", messages_column="conversations")

hh_rlhf_helpful = partial(preference, source="RLHFlow/HH-RLHF-Helpful-standard")

stack_exchange_paired = partial(
    preference,
    source="lvwerra/stack-exchange-paired",
    data_dir="data/rl",
    prompt_column="question",
    chosen_column="response_j",
    rejected_column="response_k",
    template="question_answer",
)

cnn_dailymail = partial(text, source="abisee/cnn_dailymail", name="3.0.0", column="article")

wikitext = partial(
    text, source="EleutherAI/wikitext_document_level", name="wikitext-103-v1", column="page"
)

# Reward functions find the result after "####" at the end of `answer`.
gsm8k = partial(questions, source="openai/gsm8k", name="main", prompt_column="question")
