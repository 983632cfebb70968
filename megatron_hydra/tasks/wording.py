"""What prompts of generation tasks say: in RULER's words, or short as training documents.

Texts follow RULER's tasks (arXiv 2404.06654, appendix B): context, question, and the start of the
answer, which the model goes on with. `{context}` stands for what is searched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The sentences of all tasks, and how long an answer may be.

    Attributes:
        needle: States that `{key}` has `{value}`.
        retrieval: Prompt of the needle tasks; also with `{keys}`, `{values}` (what is asked for,
            in the singular or plural) and `{is_are}`.
        value_words: What a value is called, singular and plural.
        num_digits: Of a value that is a number.
        retrieval_tokens: That are generated.
        tracking: Prompt of variable tracking, with `{value}` and `{count}`.
        tracking_tokens: That are generated.
        common: Prompt of common words, with `{count}`.
        common_tokens: That are generated.
        frequent: Prompt of frequent words.
        frequent_tokens: That are generated.
    """

    needle: str
    retrieval: str
    value_words: tuple[str, str]
    num_digits: int
    retrieval_tokens: int
    tracking: str
    tracking_tokens: int
    common: str
    common_tokens: int
    frequent: str
    frequent_tokens: int


WORDINGS = {
    "ruler": Wording(
        needle="One of the special magic {values} for {key} is: {value}.",
        retrieval=(
            "Some special magic {values} are hidden within the following text. Make sure to "
            "memorize it. I will quiz you about the {values} afterwards.\n{context}\n"
            "What {is_are} the special magic {asked} for {keys} mentioned in the provided text? "
            "The special magic {asked} for {keys} mentioned in the provided text {is_are}"
        ),
        value_words=("number", "numbers"),
        num_digits=7,
        retrieval_tokens=128,
        tracking=(
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n{context}\nQuestion: Find all variables that are assigned the value {value} "
            "in the text above. Answer: According to the chain(s) of variable assignment in the "
            "text above, {count} variables are assigned the value {value}, they are: "
        ),
        tracking_tokens=30,
        common=(
            "Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n{context}\n"
            "Question: What are the {count} most common words in the above list? Answer: The top "
            "{count} words that appear most often in the list are:"
        ),
        common_tokens=120,
        frequent=(
            "Read the following coded text and track the frequency of each coded word. Find the "
            "three most frequently appeared coded words. {context}\nQuestion: Do not provide any "
            "explanation. Please ignore the dots '....'. What are the three most frequently "
            "appeared words in the above coded text? Answer: According to the coded text above, "
            "the three most frequently appeared words are:"
        ),
        frequent_tokens=50,
    ),
    "short": Wording(
        needle="\nThe number for {key} is {value}.\n",
        retrieval=(
            "{context}\nWhat is the number for {keys}? The number for {keys} is "  # as in training
        ),
        value_words=("number", "numbers"),
        num_digits=4,
        retrieval_tokens=16,
        tracking="{context}\nWhich variables are {value}? The {count} variables are ",
        tracking_tokens=30,
        common="{context}\nThe {count} most common words are",
        common_tokens=60,
        frequent="{context}\nThe three most frequent words are",
        frequent_tokens=30,
    ),
}
"""`short` is the wording of :mod:`~megatron_hydra.tasks.needles`, for models that were trained on
its documents and for short lengths; an answer of four digits needs few tokens."""
