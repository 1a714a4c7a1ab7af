"""Forward FLOPs of one example by formulas: matrix products alone, a multiply-add is 2."""


def layers(config, tokens):
    """Per layer 8 n w^2 for the four projections, 4 n^2 w for the two products of attention and 4 n
    w m for the feed-forward layer."""
    n, w, m = tokens, config.width, config.mlp_dim
    return float(config.depth * (8 * n * w * w + 4 * n * n * w + 4 * n * w * m))


def attention_pooling(config, tokens):
    """One query, keys and values of all tokens."""
    n, w, m = tokens, config.width, config.mlp_dim
    return float(4 * n * w * w + 4 * w * w + 4 * n * w + 4 * w * m)


def vit(tower, kept=None):
    """Of an image of which `kept` patches are seen, all by default."""
    patches = tower.patches if kept is None else kept
    tokens = tower.prefix_tokens + patches
    flops = 2.0 * patches * 3 * tower.patch_size**2 * tower.width
    flops += layers(tower.transformer, tokens)
    pools = tower.pooling == "map"
    return flops + (attention_pooling(tower.transformer, tokens) if pools else 0)


def text(tower):
    flops = layers(tower.transformer, tower.context_length)
    pools = tower.pooling == "map"
    return flops + (attention_pooling(tower.transformer, tower.context_length) if pools else 0)


def dual_encoder(model, kept=None):
    """Of a pair, without the loss."""
    flops = vit(model.image, kept) + text(model.text)
    for tower, head in ((model.image, model.image_head), (model.text, model.text_head)):
        flops += 2.0 * model.embed_dim * tower.width * (head != "none")
    return flops


def masked_autoencoder(model, kept):
    decoder = model.decoder
    width, tokens = decoder.transformer.width, decoder.class_token + decoder.patches
    flops = vit(model.image, kept)
    flops += 2.0 * (model.image.class_token + kept) * model.image.width * width
    flops += layers(decoder.transformer, tokens)
    return flops + 2.0 * decoder.patches * width * decoder.outputs


def classifier(model):
    return vit(model.image) + 2.0 * model.image.width * model.classes


def question_answerer(model):
    image, words, fusion = model.image, model.text, model.fusion.transformer
    seen = image.tokens * image.width + words.context_length * words.width
    flops = vit(image) + text(words) + 2.0 * seen * fusion.width
    flops += layers(fusion, 1 + image.tokens + words.context_length)
    return flops + 2.0 * fusion.width * model.answers
