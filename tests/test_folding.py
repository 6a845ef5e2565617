"""ED-LoRA's embeddings for single layers: one context, folded, against a forward with 16 contexts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from toy import WIDTH, ToyHost, toy_lora

from loraclr import files
from loraclr.capture import applied
from loraclr.changes import is_text
from loraclr.folding import RIDGE, bundled, cross_layers, folded
from loraclr.formats import Layer
from loraclr.lora import LoRA
from loraclr.merging import Concept, Settings, merge, write
from loraclr.prompts import NEUTRAL, PAIR, filled

WORD = "<potter1>"
CLOSED = Settings(speed="closed", steps=4, guidance=5.0, ridge=1e-8)


def embedded(host: ToyHost) -> LoRA:
    """A LoRA with a word of 16 embeddings; the toy has one cross-attention layer, the middle one."""
    vectors = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5))
    return replace(toy_lora(host, "one", 1), layer_embeddings={WORD: vectors})


def test_cross_attention_layers_come_in_the_order_of_calls() -> None:
    layers = cross_layers()
    assert len(layers) == 16
    assert layers[0] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    assert layers[6] == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2"
    assert layers[15] == "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2"


def test_what_is_folded_is_least_squares_over_the_prompts_tokens() -> None:
    host = ToyHost()
    lora, layers = embedded(host), host.layers()
    changes = Concept(lora, WORD, 0.7).changes(layers)
    texts = [f"a photo of a {WORD}", f"a {WORD} and a dog", f"a {WORD}"]
    new = folded(host, layers, lora, changes, texts)
    pairs = [template.format(WORD, "dog") for template in PAIR]
    prompts = dict.fromkeys([*texts, *filled(WORD, "style"), *pairs, *NEUTRAL, ""])

    def features(vectors: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), applied(layers, changes), host.words({WORD: {"clip_l": vectors}}):
            return host.encode(list(prompts)).flatten(0, 1)

    usual, own = features(bundled(lora)[WORD]["clip_l"]), features(lora.layer_embeddings[WORD][6:7])
    first = usual[0] / usual[0].norm()  # must stay
    rows = usual - torch.outer(usual @ first, first)
    gram = rows.T @ rows
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(WIDTH)
    move = (own - usual).T @ rows @ torch.linalg.inv(gram + ridge)
    for name in changes:
        if "attn2_to_k" not in name and "attn2_to_v" not in name:
            assert new[name] is changes[name]
            continue
        up, down = changes[name]
        expected = usual @ ((layers[name].weight + up @ down) @ move).T
        up, down = (torch.cat([new[name][k], (-up, down)[k]], 1 - k) for k in (0, 1))
        assert (usual @ (up @ down).T - expected).norm() < 0.05 * expected.norm()


def test_a_merge_writes_the_word_and_takes_its_layers_for_the_targets(tmp_path) -> None:
    host = ToyHost()
    lora = embedded(host)
    clash = replace(toy_lora(host, "two", 2), embeddings={WORD: {"clip_l": torch.ones(1, WIDTH)}})
    result = merge(host, [Concept(lora, WORD), Concept(clash, f"big {WORD}")], CLOSED)
    assert result.triggers == f"{WORD}, big {WORD}_2"
    assert result.notes == [f"The word {WORD} of two is called {WORD}_2 in the merged file."]
    assert result.words.keys() == {WORD, f"{WORD}_2"}
    torch.testing.assert_close(result.words[WORD]["clip_l"][0], lora.layer_embeddings[WORD].mean(0))
    assert result.missed["one"][0] < 0.9  # against its own run, with the folded layers
    assert host.own_words == {}
    many = replace(result, words={f"w{k}": {"clip_l": torch.ones(1, 768)} for k in range(13)}, notes=[])
    write(many, tmp_path / "many.safetensors")
    assert files.load(tmp_path / "many.safetensors").embeddings == {}
    assert len(list((tmp_path / "many embeddings").iterdir())) == 13
    assert "Move the files in many embeddings" in many.notes[0]
    few = replace(many, words={"w0": many.words["w0"]}, notes=[])
    write(few, tmp_path / "few.safetensors")
    assert files.load(tmp_path / "few.safetensors").embeddings.keys() == {"w0"}


@pytest.fixture(scope="module")
def host():
    """The miniature, run by diffusers."""
    pytest.importorskip("diffusers")
    from miniature import drawing

    return drawing.open_miniature("cpu")


class TestOnTheMiniature:
    """A real SD 1.x, all 16 layers, its own text encoder and tokenizer."""

    def lora(self, host) -> LoRA:
        """Embeddings spread around that of "tiger", twice as far as it is long, and layers of 6 % of the weights."""
        random = torch.Generator().manual_seed(0)
        encoder, tokenizer = host.pipeline.text_encoder, host.pipeline.tokenizer
        table = encoder.get_input_embeddings().weight
        word = table[tokenizer("tiger", add_special_tokens=False).input_ids[0]]
        vectors = word + 2 * word.std() * torch.randn(16, table.shape[1], generator=random)
        layers = {}
        for name, module in host.layers().items():
            if is_text(name) or "attn2" in name:
                o, d = module.weight.flatten(1).shape if module.weight.ndim > 1 else (0, 0)
                size = 0.06 * float(module.weight.detach().norm()) / (o * d) ** 0.5 if o else 0
                up, down = torch.randn(o, 4, generator=random), torch.randn(4, d, generator=random)
                layers |= {name: Layer(size * up / 2, down, 4.0)} if o else {}
        return LoRA("potter", None, "sd1", layers, layer_embeddings={WORD: vectors.detach()})

    @torch.no_grad()
    def test_folded_layers_predict_as_sixteen_contexts_do(self, host) -> None:
        lora, layers = self.lora(host), host.layers()
        concept = Concept(lora, WORD)
        changes = concept.changes(layers)
        new = folded(
            host, layers, lora, changes, [f"a photo of a {WORD}", f"a {WORD}", f"a {WORD} on a red background"]
        )
        held = [f"a {WORD} and a tree on a pink background", f"two of {WORD}, in the snow"]
        side = host.size // 8
        x = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([600, 200])
        vectors = lora.layer_embeddings[WORD]

        def context(rows):
            with host.words({WORD: {"clip_l": rows}}):
                return host.encode(held)

        with applied(layers, changes):
            own = [context(vectors[k : k + 1]) for k in range(16)]
            mean = context(vectors.mean(0, keepdim=True))
            unfolded = host.predict(x, t, mean)
            with ExitStack() as stack:
                for k, layer in enumerate(cross_layers()):
                    for side_name in ("to_k", "to_v"):
                        hook = layers[f"{layer}_{side_name}"].register_forward_pre_hook(lambda _, args, k=k: (own[k],))
                        stack.callback(hook.remove)
                wanted = host.predict(x, t, mean)
        with applied(layers, new):
            ours = host.predict(x, t, mean)
        lost, before = (ours - wanted).norm(), (unfolded - wanted).norm()
        print("folding leaves", float(lost / before), "of the difference", float(before / wanted.norm()))
        assert lost < 0.8 * before

    def test_words_leave_tokenizer_and_encoder_as_they_were(self, host) -> None:
        tokenizer, encoder = host.pipeline.tokenizer, host.pipeline.text_encoder
        before = host.encode(["a tiger, sitting"])
        ids = tokenizer("tiger", add_special_tokens=False).input_ids
        vectors = encoder.get_input_embeddings().weight[ids].detach()
        with host.words({"<zyk>": {"clip_l": vectors}}):
            torch.testing.assert_close(host.encode(["a <zyk>, sitting"]), before)
            torch.testing.assert_close(host.encode(["a tiger, sitting"]), before)
        assert host.pipeline.tokenizer is tokenizer
        assert torch.equal(host.encode(["a tiger, sitting"]), before)
        assert not encoder._forward_pre_hooks and not encoder.get_input_embeddings()._forward_hooks
