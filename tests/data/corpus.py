"""A thousand captions in many scripts, the same in every run, and models to compare on them."""

import functools
import io
import random

import sentencepiece

SCRIPTS = {
    "english": "a red circle left of two blue squares it's they're we've I'd dog's THE Big",
    "latin": "großer grüner Würfel œuvre naïve façade Ångström señor Čeština İstanbul ığ ĳs ﬁne",
    "vietnamese": "một hình tròn màu đỏ bên trái hai ô vuông xanh",
    "cyrillic": "красный круг слева от синего КВАДРАТА їжак ёлка Ђурђевдан",
    "greek": "κόκκινος ΚΎΚΛΟΣ αριστερά ΜΠΛΕ ΤΕΤΡΆΓΩΝΟ ΟΔΟΣ σοφός Σ ΣΑΣ",
    "arabic": "دائرة حمراء بجانب مربع أزرق ١٢٣ مُحَمَّد لا",
    "hebrew": "עיגול אדום ליד ריבוע כחול שָׁלוֹם",
    "devanagari": "नीले वर्ग के पास लाल वृत्त क़लम १२",
    "thai": "วงกลมสีแดงอยู่ข้างสี่เหลี่ยม น้ำ กำ ๔๒",
    "han": "红色圆圈 在蓝色方块的左边， “左边”！ 漢字。 ＡＢＣ１２",
    "kana": "青い四角の 左に 赤い丸が あります ｱｶｲ ガ ヴ ㌔ 、。",
    "hangul": "파란 사각형 왼쪽의 빨간 원 한글",
    "georgian": "კარგი წითელი წრე ᲙᲐᲠᲒᲘ",
    "amharic": "ቀይ ክብ በሰማያዊ ካሬ ፩፪",
    "emoji": "🟥 👩‍👩‍👧 👍🏽 🇩🇪 ❤️ ☃",
    "marks": "e\u0301te\u0301 o\u0308 n\u0303 a\u0323\u0302 \u1112\u1161\u11ab \u304b\u3099 \u0345",
    "signs": "½ ² Ⅷ ① ™ © € 1,234.5% C++ #tag @home x_y -- ... !!! 42nd 3x4 (a) [b] {c} ~ ^",
    "entities": "&amp; &lt;b&gt; &quot;x&quot; &amp;amp; AT&T &#39; fish&chips",
    "mojibake": "schÃ¶n MÃ¼nchen â€œquotedâ€\x9d cafÃ© donâ€™t",
    "control": "bell\x07 \x1b[31mred\x1b[0m \ufeffmark z\u0085y \u200bzero \u00a0hard \x00nul",
    "special": "<|endoftext|> </s> <pad> <eos> [CLS] <0x41>",
}
SEPARATORS = (" ", " ", " ", " ", "  ", "\t", "\n", " \r\n", "\u00a0", "\u3000", ", ", "-")


@functools.cache
def captions(without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A thousand: of one script, of several, empty, blank, and very long."""
    rng = random.Random(0)
    words = {name: text.split(" ") for name, text in SCRIPTS.items() if name not in without}
    texts = ["", " ", "\n\t", "!", "a", "x" * 5000, "ab " * 3000, "\u4e00" * 500]
    while len(texts) < 1000:
        names = list(words) if rng.random() < 0.3 else [rng.choice(list(words))]
        text = ""
        for _ in range(rng.randint(1, 12)):
            text += rng.choice(words[rng.choice(names)]) + rng.choice(SEPARATORS)
        texts.append(text if rng.random() < 0.3 else text.strip())
    return tuple(texts)


@functools.cache
def sentencepiece_model(**settings: object) -> bytes:
    """The .model file of a small model that is trained on some of the captions."""
    written = io.BytesIO()
    texts = [" ".join(text.split()) for text in captions(("control", "special"))[8:400]]
    defaults = {"model_type": "unigram", "vocab_size": 900, "character_coverage": 0.995}
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, **special, **settings},
    )
    return written.getvalue()


# How published models are trained (SigLIP's as T5's, SigLIP 2's as Gemma's), and other settings.
LLAMA = {
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    **{"remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
}
GEMMA = {
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    **{"remove_extra_whitespaces": False, "add_dummy_prefix": False, "bos_id": 2, "unk_id": 3},
    "user_defined_symbols": "<mask>,\u2581\u2581,\u2581\u2581\u2581,<b>",
}
MODELS = {
    "t5": {},
    "bpe": {"model_type": "bpe"},
    "llama": LLAMA,
    "gemma": GEMMA,
    "folding": {"normalization_rule_name": "nmt_nfkc_cf"},
    "byte fallback": {"byte_fallback": True},
    "no prefix": {"add_dummy_prefix": False},
    "identity": {"normalization_rule_name": "identity"},
}
