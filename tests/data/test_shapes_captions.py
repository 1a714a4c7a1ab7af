"""Captions and questions, read back by a parser that shares no code with their grammar."""

from __future__ import annotations

import collections
import re

import pytest

from vlp_jax.data.shapes import captions, clips, questions, scenes, vocabulary

SIZE = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
TEXTURE = {
    "solid": "solid",
    "plain": "solid",
    "striped": "striped",
    "dotted": "dotted",
    "spotted": "dotted",
    "outlined": "outlined",
    "hollow": "outlined",
}
NOUNS = {s: {"shape": s} for s in vocabulary.SHAPES} | {"shape": {}, "object": {}, "something": {}}
PLURAL = {(n + "es" if n == "cross" else n + "s"): v for n, v in NOUNS.items() if n != "something"}
NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4}
ADJECTIVE = (
    {w: {"size": v} for w, v in SIZE.items()}
    | {w: {"texture": v} for w, v in TEXTURE.items()}
    | {c: {"color": c} for c in vocabulary.COLORS}
)
POSITION = re.compile(
    r"\b(?:at|in|on) the "
    r"(top left|top right|bottom left|bottom right|top|bottom|left|right|center|middle)"
    r"(?: corner)?\b(?! of)"
)
FRAME = re.compile(
    r"\b(?:a|an) (?:picture|image|drawing) (?:of|with)\b"
    r"|\bthe (?:picture|image) (?:shows|contains)\b"
)
BACKGROUND = re.compile(r"\ba (\w+) background( with)?\b")
_WORDS = "|".join(ADJECTIVE)
_AFTER = rf"(?:{_WORDS})(?: and (?:{_WORDS}))*"
SOMETHING = re.compile(rf"\bsomething ({_AFTER})\b")
THAT_IS = re.compile(rf"\b(an?) (\w+) that is ({_AFTER})\b")
RELATION = re.compile(
    r"(?:is )?(?:to the |on the )?(left of|right of|above|higher than|over|below|lower than|under|"
    r"larger than|bigger than|smaller than) "
)
SCENES = [(split, i) for split in vocabulary.SPLITS for i in range(250)]


def fits(obj, wanted):
    return all(getattr(obj, k) == v for k, v in wanted.items())


def adjectives_first(words, noun):
    return f"a {words.replace(' and ', ' ')} {noun}"


def mentions(text):
    """(article or number, attributes, is plural) of each noun phrase, in order."""
    text = BACKGROUND.sub("", FRAME.sub("", text))
    text = RELATION.sub(" ", POSITION.sub(lambda m: f"@{m[1].replace(' ', '_')}", text))
    text = SOMETHING.sub(lambda m: adjectives_first(m[1], "object"), text)
    text = THAT_IS.sub(lambda m: adjectives_first(m[3], m[2]), text)
    found, determiner, attributes = [], "a", {}
    for word in re.findall(r"@?\w+", text):
        if word in ("a", "an", "the", "another", *NUMBER):
            determiner, attributes = word, {}
        elif word in ADJECTIVE:
            attributes = attributes | ADJECTIVE[word]
        elif word in NOUNS or word in PLURAL:
            found.append((determiner, attributes | (NOUNS | PLURAL)[word], word in PLURAL))
            determiner, attributes = "a", {}
        elif word.startswith("@"):
            place = word[1:].replace("_", " ")
            found[-1][1]["position"] = "center" if place == "middle" else place
    return found


def check_caption(scene, text):
    """Asserts that what `text` says of objects, numbers and the background holds."""
    found = mentions(text)
    assert found, text
    for determiner, wanted, plural in found:
        number = sum(fits(o, wanted) for o in scene.objects)
        assert number >= 1, (text, wanted)
        if determiner in NUMBER:
            assert number == NUMBER[determiner], (text, wanted)
            assert plural == (number > 1), text
        if determiner == "the":
            assert number == 1, (text, wanted)
        if determiner == "another":
            assert number >= 2, (text, wanted)
    for name in re.findall(r"(\w+) background", text):
        assert name == scene.background.name, text
    for word in re.findall(r"\w+", text):
        if word in vocabulary.COLORS:
            assert any(o.color == word for o in scene.objects), text


def relation_holds(a, word, b):
    return {
        "left of": a.x < b.x,
        "right of": a.x > b.x,
        "above": a.y < b.y,
        "higher than": a.y < b.y,
        "over": a.y < b.y,
        "below": a.y > b.y,
        "lower than": a.y > b.y,
        "under": a.y > b.y,
        "larger than": a.radius > b.radius + 2,
        "bigger than": a.radius > b.radius + 2,
        "smaller than": a.radius < b.radius - 2,
    }[word]


def captions_of(split, index):
    scene = scenes.sample_scene(0, split, index)
    rng = scenes.generator(0, split, index, scenes.STREAM_CAPTIONS)
    return scene, captions.scene_captions(scene, rng)


def test_parser_sees_what_a_caption_says():
    text = (
        "a picture of a big striped red circle in the top left corner and something blue and tiny"
    )
    assert mentions(text) == [
        ("a", {"size": "large", "texture": "striped", "color": "red", "shape": "circle"}
         | {"position": "top left"}, False),
        ("a", {"color": "blue", "size": "small"}, False),
    ]  # fmt: skip
    assert mentions("two circles and one red star") == [
        ("two", {"shape": "circle"}, True),
        ("one", {"color": "red", "shape": "star"}, False),
    ]
    assert mentions("a star that is red and hollow") == [
        ("a", {"shape": "star", "color": "red", "texture": "outlined"}, False)
    ]


def test_checker_refuses_a_false_caption():
    scene = scenes.sample_scene(0, "train", 1)
    other = next(c for c in vocabulary.COLORS if c != scene.objects[0].color)
    for false in (f"something {other}", "two objects", f"a {other} {scene.objects[0].shape}"):
        with pytest.raises(AssertionError):
            check_caption(scene, false)


def test_captions_are_true_short_and_distinct():
    related = 0
    for split, index in SCENES:
        scene, texts = captions_of(split, index)
        assert len(set(texts)) == len(texts) == vocabulary.CAPTIONS_PER_SCENE
        for text in texts:
            assert vocabulary.num_tokens(text) <= vocabulary.MAX_CAPTION_TOKENS, text
            assert text.isascii() and text == text.lower()
            check_caption(scene, text)
            relation = RELATION.search(text)
            if relation:
                related += 1
                (_, one, _), (_, other, _) = mentions(text)
                holding = [
                    (a, b)
                    for a in scene.objects
                    for b in scene.objects
                    if a is not b and fits(a, one) and fits(b, other)
                    if relation_holds(a, relation.group(1), b)
                ]
                assert holding, text
    assert related > 100


def test_articles_agree_with_the_next_word():
    for split, index in SCENES:
        for text in captions_of(split, index)[1]:
            for article, letter in re.findall(r"\b(an?) (\w)", text):
                assert (article == "an") == (letter in "aeiou"), text


def test_detailed_caption_names_every_adjective_and_the_background():
    for split, index in SCENES:
        scene, texts = captions_of(split, index)
        found = [wanted for _, wanted, _ in mentions(texts[0])]
        assert len(found) == len(scene.objects)
        assert all({"size", "texture", "color", "shape"} <= set(w) for w in found), texts[0]
        assert f"{scene.background.name} background" in texts[0]
        if len(scene.objects) <= 2:
            assert all("position" in w for w in found), texts[0]


def test_other_captions_name_a_varying_part():
    named = collections.Counter()
    total = 0
    for split, index in SCENES:
        scene, texts = captions_of(split, index)
        if len(scene.objects) > 1:
            continue
        for text in texts[1:]:
            attributes = mentions(text)[0][1]
            named.update([("color" in attributes, "shape" in attributes)])
            named.update(a for a in attributes)
            total += 1
    for combination, share in {
        (True, False): 0.02,
        (False, True): 0.12,
        (True, True): 0.12,
    }.items():
        assert named[combination] > share * total, named
    for attribute in ("size", "texture", "position"):
        assert 0.1 * total < named[attribute] < 0.6 * total, named


def test_held_out_combinations_are_never_named_in_training():
    phrases = [f"{c} {s}" for c, s in vocabulary.HELD_OUT]
    phrases += [p + ("es" if p.endswith("s") else "s") for p in phrases]
    pattern = re.compile(r"\b(" + "|".join(phrases) + r")\b")
    in_test = 0
    for split, index in SCENES:
        scene, texts = captions_of(split, index)
        rng = scenes.generator(0, split, index, scenes.STREAM_QUESTIONS)
        texts = texts + [q.question for q in questions.scene_questions(scene, split, rng)]
        hits = [t for t in texts if pattern.search(t)]
        in_test += bool(hits) and split == "test"
        assert split == "test" or not hits
    assert in_test > 40


def asked(split, count):
    for index in range(count):
        scene = scenes.sample_scene(0, split, index)
        rng = scenes.generator(0, split, index, scenes.STREAM_QUESTIONS)
        for question in questions.scene_questions(scene, split, rng):
            yield scene, question


def described(scene, text):
    """The objects that "the ... object" or "a ... circle" of a question can mean, in order."""
    return [
        [o for o in scene.objects if fits(o, wanted)]
        for _, wanted, _ in mentions(text.replace("the color of", "").replace("the texture of", ""))
    ]


def test_answers_follow_from_the_scene():
    checked = collections.Counter()
    for scene, q in asked("test", 700):
        assert q.answer in vocabulary.ANSWERS and q.kind in vocabulary.QUESTION_KINDS
        text = q.question.replace("shape is", "is").replace("which shape", "which")
        if q.kind in ("color", "shape", "size", "texture", "position"):
            text = re.sub(r"small or large", "", text)
            (candidates,) = described(scene, text)
            assert [getattr(o, q.kind) for o in candidates] == [q.answer], q
        elif q.kind == "background":
            assert q.answer == scene.background.name
        elif q.kind == "count":
            (candidates,) = described(scene, text)
            assert vocabulary.COUNTS[len(candidates)] == q.answer, q
        elif q.kind == "existence":
            (candidates,) = described(scene, text)
            assert (q.answer == "yes") == bool(candidates), q
        elif q.kind == "relation" and q.answer in ("yes", "no"):
            (a,), (b,) = described(scene, text)
            word = re.search("left of|right of|above|below", text).group()
            assert (q.answer == "yes") == relation_holds(a, word, b), q
        elif "er than" in text:
            (a,), (b,) = described(scene, text)
            word = "larger than" if "larger" in text else "smaller than"
            assert (q.answer == "yes") == relation_holds(a, word, b), q
        elif "more" in text:
            one, other = described(scene, text)
            assert (q.answer == "yes") == (len(one) > len(other)), q
        elif "same" in text:
            (a,), (b,) = described(scene, re.sub("have the same.*", "", text))
            attribute = re.search(r"same (\w+)", text).group(1)
            same = getattr(a, attribute) == getattr(b, attribute)
            assert (q.answer == "yes") == same, q
        else:
            continue
        checked[q.kind] += 1
    assert set(checked) == set(vocabulary.QUESTION_KINDS)
    assert min(checked.values()) > 50, checked


def test_yes_and_no_are_balanced_by_kind_and_by_wording():
    by_kind, by_text = (collections.defaultdict(collections.Counter) for _ in range(2))
    for _, q in asked("train", 4000):
        if q.answer in ("yes", "no"):
            by_kind[q.kind][q.answer] += 1
            text = q.question.replace("does the picture contain", "is there")
            by_text[text][q.answer] += 1
    assert set(by_kind) == {"existence", "relation", "comparison"}
    for kind, answers in by_kind.items():
        assert 0.45 < answers["yes"] / answers.total() < 0.55, (kind, answers)
    frequent = [a for a in by_text.values() if a.total() >= 24]
    assert len(frequent) > 20
    for answers in frequent:
        assert 0.2 < answers["yes"] / answers.total() < 0.8, answers


def test_clip_captions_are_true():
    phrase_of = {p: m for m, phrases in clips.MOTION_PHRASES.items() for p in phrases}
    phrases = "|".join(sorted(phrase_of, key=len, reverse=True))
    seen = set()
    for index in range(150):
        clip = clips.sample_clip(0, "train", index)
        texts = clips.clip_captions(clip, scenes.generator(0, "train", index, 2))
        assert len(set(texts)) == clips.CAPTIONS_PER_CLIP
        for text in texts:
            assert vocabulary.num_tokens(text) <= vocabulary.MAX_CAPTION_TOKENS
            if re.search("background", text):
                assert f"{clip.background.name} background" in text
            subjects = re.split(phrases, re.sub(r"on an? \w+ background", "", text))[:-1]
            motions = [phrase_of[p] for p in re.findall(phrases, text)]
            assert len(motions) == len(subjects) >= 1, text
            for subject, motion in zip(subjects, motions, strict=True):
                ((_, wanted, _),) = mentions(re.sub(r"^ *(while|and) ", "", subject))
                moving = [o for o in clip.objects if fits(o.start, wanted)]
                assert motion in {o.motion for o in moving}, text
                seen.add(motion)
                if motion in ("left", "right"):
                    assert re.search(rf"\b{motion}\b", text)
    assert seen == set(vocabulary.MOTIONS)
