"""The model card says what is known, hubs read its front matter, and no value of a run becomes markup."""

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cm.io.terminal import printable
from cm.report.model_card import Card, render
from cm.report.run_facts import Measurement, RunFacts

CONFIG = {"arch": "unet", "image_size": 8, "channels": 3, "class_cond": True, "num_classes": 2, "sigma_min": 0.002,
          "sigma_max": 80.0, "training_mode": "ect"}
FACTS = RunFacts("pets.zip", 1234, 5000, 640000, 7200.0, "cm-distill --data_dir pets.zip",
                 (Measurement("FID", 2.345678, 50000, "inception-2015"),))
ATTACKS = [
    "---\nlicense: evil", "x\n# heading", "`code", "```\nfence\n```", "<script>alert(1)</script>", "[a](javascript:1)",
    "![a](https://e.vil/p.png)", "a | b | c", "<https://e.vil>", "&lt;b&gt;", "https://e.vil", "*b* _i_ ~~s~~", "$x$",
    "\u202ereversed", "{{ 7 * 7 }}", "- item", "!!python/object:os.system", "a: b #", "[[x]]", "@someone", "\x1b[31m",
]


def parts(text):
    """Front matter as data, and the page as tokens of Markdown."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(body), body


def kinds(tokens):
    """How often each kind of token occurs, inline ones too; headings and links matter, text does not."""
    flat = [inner for token in tokens for inner in [token, *(token.children or [])]]
    return sorted(token.type for token in flat if token.type not in ("text", "text_special", "softbreak"))


def shown(tokens):
    return " ".join("".join(inner.content for inner in token.children) for token in tokens if token.children)


def card(text="", **changes):
    values = dict(title="pets", config=CONFIG, class_names=["cat", "dog"], facts=FACTS, few_steps=True,
                  parameters=1234567, picture="samples.png", licence="mit")
    return render(Card(**{**values, **changes}))


def test_what_is_known_is_on_the_card():
    front, tokens, body = parts(card())
    text = shown(tokens)
    assert front["license"] == "mit" and front["library_name"] == "consistency-toolkit"
    assert {"ect", "few-step", "class-conditional"} <= set(front["tags"]) and "pipeline_tag" not in front
    for words in ("pets.zip, 1,234 images", "cat, dog", "5,000", "640,000", "1,234,567 parameters"):
        assert words in text, words
    assert "| FID | 2.34568 | 50,000 | inception-2015 |" in body and "cm-distill --data\\_dir" not in body
    assert "```\ncm-distill --data_dir pets.zip\n```" in body and "![Samples](samples.png)" in body


def test_what_is_not_known_is_not_made_up():
    config = CONFIG | {"class_cond": False}
    front, tokens, body = parts(card(config=config, facts=RunFacts(), class_names=(), picture="", licence=""))
    assert front["license"] == "unknown" and front["pipeline_tag"] == "unconditional-image-generation"
    assert "its owner has named none" in shown(tokens) and "The data set was not recorded." in body
    assert "Nothing was recorded." in body and "samples.png)" not in body and "Training command" not in body


def test_a_hub_reads_the_front_matter():
    data = ModelCard(card()).data
    assert data.license == "mit" and data.library_name == "consistency-toolkit" and "diffusion" in data.tags


@pytest.mark.parametrize("text", ATTACKS)
def test_no_value_becomes_markup(text):
    """As many headings, cells, links and blocks as with harmless words, and the words are shown as they are."""
    def with_words(words):
        measured = (Measurement(words, 1.0, 5, words),)
        facts = RunFacts(words, 5, 1, 1, 1.0, words, measured)
        return card(title=words, config=CONFIG | {"training_mode": words}, class_names=[words, "dog"], facts=facts,
                    licence=words)

    front, tokens, _ = parts(with_words(text))
    plain_front, plain_tokens, _ = parts(with_words("harmless"))
    assert kinds(tokens) == kinds(plain_tokens)
    assert front.keys() == plain_front.keys() and len(front["tags"]) == len(plain_front["tags"])
    assert isinstance(front["license"], str) and front["license"] not in ("evil", "unknown")
    assert shown(tokens).count(printable(text)) == shown(plain_tokens).count("harmless") > 5


def test_long_lists_and_words_are_cut():
    text = card(class_names=[f"class{n}" for n in range(1000)], title="x" * 10**6)
    assert "class99" in text and "class100," not in text and "and 900 more" in text and len(text) < 10_000
