"""The rows of the tab: what a LoRA is, what is wrong with it, order, weights, and the LoRAs of the prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from webui_driver import Tab, Webui

from miniature.vocabulary import CONCEPT

TIGER, PANDA = CONCEPT["tiger"], CONCEPT["panda"]


def add(webui: Webui, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A LoRA file more, which the webui is told of."""
    path = webui.loras / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    webui.ask("/sdapi/v1/refresh-loras", {})
    return path


def remove(webui: Webui, *paths: Path) -> None:
    """And away with it."""
    for path in paths:
        path.unlink()
    webui.ask("/sdapi/v1/refresh-loras", {})


def xl(rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of SDXL, small."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    return {
        f"{stem}.lora_up.weight": torch.ones(640, rank), f"{stem}.lora_down.weight": torch.ones(rank, 2048),
        f"{stem}.alpha": torch.tensor(1.0),
    }  # fmt: skip


def test_what_it_is_and_what_is_wrong(webui: Webui, tab: Tab) -> None:
    """Said in the row, before Merge is pressed: another family, no trigger words, a broken file."""
    wrong = add(webui, "wrong family", xl())
    cut = webui.loras / "half.safetensors"
    cut.write_bytes((webui.loras / f"{TIGER.name}.safetensors").read_bytes()[:2000])
    try:
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()
        tab.choose(TIGER.name, "wrong family", "half")
        tab.settle()
        assert "LoRA rank 4 · SD 1.x" in tab.facts(1)
        assert "It is for SDXL, but the loaded checkpoint is SD 1.x." in tab.facts(2)
        assert "cut off" in tab.facts(3)
        assert tab.trigger(2).input_value() == ""
        assert "none is noted" in tab.trigger(2).get_attribute("placeholder")
    finally:
        remove(webui, wrong, cut)


def test_an_ed_lora_that_the_webui_does_not_list(webui: Webui, tab: Tab) -> None:
    """A .pth file is in the list, and in the API's, with its own word as its trigger."""
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{stem}.lora_up.weight": torch.ones(320, 2), f"{stem}.lora_down.weight": torch.ones(2, 768)}
    words = {"<potter1>": torch.ones(16, 768)}
    path = webui.loras / "potter.pth"
    torch.save({"params": {"new_concept_embedding": words, "text_encoder": {}, "unet": factors}}, path)
    try:
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()
        tab.choose("potter.pth")
        tab.settle()
        assert "rank 2 · SD 1.x" in tab.facts(1)
        assert tab.trigger(1).input_value() == "<potter1>"
        assert "potter" not in {lora["name"].removesuffix(".pth") for lora in webui.ask("/sdapi/v1/loras")}
        assert ("potter.pth", str(path)) in {(lora["name"], lora["path"]) for lora in webui.ask("/loraclr/v1/loras")}
    finally:
        path.unlink()
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()


def test_pictures_in_the_list(webui: Webui, tab: Tab) -> None:
    """Beside the names of those that have one, before they are chosen."""
    plain = add(webui, "the plain one", xl(), {"ss_base_model_version": "sd_v1"})
    drawn = webui.loras / f"{TIGER.name}.preview.png"
    new = not drawn.exists()
    if new:
        Image.new("RGB", (90, 120), "red").save(drawn)
    try:
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()
        for name, status in ((TIGER.name, 200), ("the plain one", 204)):
            tab.page.locator("#loraclr_loras input").click()
            tab.page.locator("#loraclr_loras input").fill(name)
            line = tab.listed(name)
            tab.page.wait_for_function("line => line.style.backgroundImage", arg=line.element_handle())
            address = line.evaluate("line => getComputedStyle(line).backgroundImage").split('"')[1]
            assert tab.page.request.get(address).status == status
    finally:
        remove(webui, plain, *([drawn] if new else []))


def test_only_the_loaded_family_unless_asked(webui: Webui, tab: Tab) -> None:
    """A LoRA that the webui knows to be of SDXL is listed on wish."""
    path = add(webui, "an xl", xl(), {"ss_base_model_version": "sdxl_base_v1-0"})
    listed = tab.listed("an xl")
    try:
        for asked in (False, True):
            tab.page.locator("#loraclr_every input").set_checked(asked)
            tab.page.locator("#loraclr_refresh").click()
            tab.settle()
            tab.page.locator("#loraclr_loras input").click()
            tab.page.locator("#loraclr_loras input").fill("an xl")
            tab.page.wait_for_timeout(500)
            assert listed.count() == asked
            tab.page.locator("#loraclr_loras input").fill("")
            tab.page.keyboard.press("Escape")
    finally:
        remove(webui, path)


def test_two_thousand_found_by_name_folder_and_words(webui: Webui, tab: Tab) -> None:
    """Each way of searching finds the right ones of many; what is hidden is listed on wish, and can be merged."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    some = {
        f"{stem}.lora_up.weight": torch.ones(32, 1), f"{stem}.lora_down.weight": torch.ones(1, 64),
        f"{stem}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    folders = [webui.loras / f"shelf {number:02}" for number in range(19)] + [webui.loras / ".attic"]
    for number in range(2000):
        folder = folders[number % len(folders)]
        folder.mkdir(exist_ok=True)
        metadata = {"ss_v2": "False", "modelspec.trigger_phrase": f"word{number:04} cat"}
        save_file(some, folder / f"piece {number:04}.safetensors", metadata)
    options = tab.page.locator("#loraclr_loras ul.options li")

    def search(text: str, hits: int) -> None:
        """Type, and type again as long as the list of a slow server is not there yet."""
        for _ in range(60):
            tab.page.locator("#loraclr_loras input").fill("")
            tab.page.locator("#loraclr_loras input").press_sequentially(text)
            tab.page.wait_for_timeout(500)
            if options.count() == hits:
                return
        raise AssertionError(f"{text}: {options.count()} of {hits}")

    try:
        tab.page.locator("#loraclr_refresh").click()
        for text, hits in (("piece 0123", 1), ("WORD1001", 1), ("shelf 07", 100), ("word0019", 0), (".attic", 0)):
            search(text, hits)
        tab.page.locator("#loraclr_hidden input").check()
        search("word0019", 1)
        options.first.click()
        tab.page.locator("#loraclr_concept_1").wait_for()
        tab.settle()
        assert tab.names() == ["piece 0019"]
        assert tab.trigger(1).input_value() == "word0019 cat"
        assert "/.attic" in tab.facts(1)
    finally:
        for folder in folders:
            shutil.rmtree(folder)
        webui.ask("/sdapi/v1/refresh-loras", {})


def test_none_is_missing_while_the_webui_lists_them_anew(webui: Webui, tab: Tab) -> None:
    """It empties its list first: after a merge, when the Lora pages are asked for anew, and at their Refresh."""
    shelf = webui.loras / "shelf"
    shelf.mkdir()
    for number in range(300):
        save_file({"lora_te_x.alpha": torch.ones(())}, shelf / f"piece {number}.safetensors")

    def listed() -> int:
        tab.name("")  # elsewhere: the list closes
        tab.page.locator("#loraclr_loras input").click()
        tab.page.wait_for_timeout(300)
        return tab.page.locator("#loraclr_loras ul.options li").count()

    try:
        tab.choose(TIGER.name)
        before = listed()
        webui.ask("/sdapi/v1/refresh-loras", {})
        seen = []
        for turn in range(40):
            if turn % 5 == 0:
                tab.page.evaluate("() => { loraclrPart('look').click(); loraclrListCards(); }")
            seen.append(listed())
            assert "LoRA rank 4" in tab.facts(1)
        assert set(seen) <= {before, before + 300} and seen[-1] == before + 300, seen
    finally:
        shutil.rmtree(shelf)
        webui.ask("/sdapi/v1/refresh-loras", {})


def test_order_and_removal(tab: Tab) -> None:
    """A row moves up or goes away with all that was written in it."""
    tab.choose(TIGER.name, PANDA.name, "rocket")
    tab.trigger(3).fill("my rocket")
    tab.page.locator("#loraclr_up_3").click()
    tab.settle()
    assert tab.names() == [TIGER.name, "rocket", PANDA.name]
    assert tab.trigger(2).input_value() == "my rocket"
    tab.page.locator("#loraclr_remove_1").click()
    tab.settle()
    assert tab.names() == ["rocket", PANDA.name]
    assert tab.trigger(1).input_value() == "my rocket"


def test_the_loras_of_the_prompt(tab: Tab) -> None:
    """Names and weights of the tags, also a weight of the text encoder's own; what is no LoRA is left out."""
    prompt = f"<lora:{TIGER.name}:0.8> a cat <lora:nobody:1> <lora:{PANDA.name}:0.5:1.25>"
    tab.page.locator("#tabs > .tab-nav > button", has_text="txt2img").first.click()
    tab.page.locator("#txt2img_prompt textarea").fill(prompt)
    tab.open()
    tab.page.locator("#loraclr_take").click()
    tab.page.locator("#loraclr_concept_2").wait_for()
    tab.settle()
    assert tab.names() == [TIGER.name, PANDA.name]
    assert tab.page.locator("#loraclr_weight_1 input").input_value() == "0.8"
    assert tab.page.locator("#loraclr_text_weight_1 input").input_value() == ""
    assert tab.page.locator("#loraclr_weight_2 input").input_value() == "1.25"
    assert tab.page.locator("#loraclr_text_weight_2 input").input_value() == "0.5"


def test_weights_reach_the_file_and_come_back(webui: Webui, tab: Tab) -> None:
    """Block and text weights are in the recipe, change the layers, and are filled in again from the history."""
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.page.locator("#loraclr_draw input").uncheck()
    tab.name("blocked")
    tab.page.locator("#loraclr_more input").check()
    for number in (1, 2):
        tab.page.locator(f"#loraclr_blocks_{number} input").fill("OUT03-OUT11=0")
    tab.page.locator("#loraclr_text_weight_1 input").fill("0.5")
    assert "blocked is ready" in tab.merge()
    made = load_file(webui.loras / "blocked.safetensors")
    assert made
    assert not [key for key in made if "up_blocks_1" in key or "up_blocks_2" in key or "up_blocks_3" in key]

    tab.page.locator("#loraclr_remove_1").click()
    tab.settle()
    tab.page.locator("#loraclr_look").dispatch_event("click")
    tab.settle()
    tab.page.locator("#loraclr_history > .label-wrap").click()
    tab.page.locator("#loraclr_merged input").click()
    tab.page.locator('#loraclr_merged ul.options li[aria-label="blocked"]').click()
    tab.settle()
    tab.page.locator("#loraclr_load").click()
    tab.settle()
    assert tab.names() == [TIGER.name, PANDA.name]
    assert tab.page.locator("#loraclr_text_weight_1 input").input_value() == "0.5"
    assert "OUT03=0" in tab.page.locator("#loraclr_blocks_2 input").input_value()
    assert tab.page.locator("#loraclr_closed input").is_checked()


def test_two_earlier_merges_side_by_side(webui: Webui, tab: Tab) -> None:
    """What differs is marked: a LoRA that one lacks, its words and weight, the method; what is the same is not."""
    for name, others, method in (("first of two", [PANDA.name], "svd"), ("second of two", ["rocket"], "sum")):
        loras = [{"name": TIGER.name}, *({"name": other, "weight": 0.5} for other in others)]
        order = {"loras": loras, "name": name, "method": method, "draw": False}
        job = webui.ask("/loraclr/v1/merge", order)["job"]
        for _ in range(600):
            if (state := webui.ask(f"/loraclr/v1/jobs/{job}")["state"]) not in ("queued", "running"):
                break
            tab.page.wait_for_timeout(500)
        assert state == "done"
    tab.page.locator("#loraclr_look").dispatch_event("click")
    tab.settle()
    tab.page.locator("#loraclr_history > .label-wrap").click()
    for field, name in (("merged", "first of two"), ("other", "second of two")):
        tab.page.locator(f"#loraclr_{field} input").click()
        tab.page.locator(f'#loraclr_{field} ul.options li[aria-label="{name}"]').click()
        tab.settle()
    lines = tab.page.locator("#loraclr_merged_about tr").all()
    told = {line.locator("th").first.inner_text().strip(): line for line in lines[1:]}
    assert lines[0].locator("th").all_inner_texts() == ["", "first of two", "second of two"]
    assert told[f"{PANDA.name}.safetensors"].locator("td").all_inner_texts() == ["Part of it", "–"]
    assert told["Method of merging"].locator("td").all_inner_texts() == ["svd", "sum"]
    differs = {title for title, line in told.items() if line.get_attribute("class") == "loraclr-differs"}
    assert {"Method of merging", f"{PANDA.name}.safetensors", "rocket.safetensors"} <= differs
    assert f"{TIGER.name}.safetensors" not in differs


def test_weights_that_make_no_sense(tab: Tab) -> None:
    """Said beside the row as they are written, and in one sentence that names the LoRA if Merge is pressed anyway."""
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.page.locator("#loraclr_more input").check()
    for number, field, text, answer in (
        (1, "text_weight", "half", 'The text encoder weight "half" is no number.'),
        (2, "blocks", "1, 2, 3", "3 block weights were given, but SD 1.x takes 17 or 26."),
        (2, "blocks", "OUT99=1", "is no block; the blocks are"),
    ):
        written = tab.page.locator(f"#loraclr_{field}_{number} input")
        written.fill(text)
        tab.settle()
        assert answer in tab.facts(number)
        tab.page.locator("#loraclr_look").dispatch_event("click")
        tab.settle()
        assert answer in tab.facts(number), "another look at the folder does not forget it"
        written.fill("")
        tab.settle()
        assert answer not in tab.facts(number)
    tab.page.locator("#loraclr_blocks_2 input").fill("1, 2, 3")
    assert f"{PANDA.name}: 3 block weights were given" in tab.merge()


def test_the_name_is_checked_as_it_is_typed(webui: Webui, tab: Tab) -> None:
    """And the size is told."""
    note = tab.page.locator("#loraclr_note.prose")
    tab.choose(TIGER.name, PANDA.name)
    tab.name("fine")
    tab.settle()
    assert note.inner_text().startswith("fine.safetensors, about ")
    tab.name(TIGER.name)
    tab.settle()
    assert "is one of the LoRAs to merge" in note.inner_text()


def test_a_subset_of_the_concepts_and_downloads(webui: Webui, tab: Tab) -> None:
    """The prompt follows the choice of concepts; report and recipe can be had."""
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.page.locator("#loraclr_draw input").uncheck()
    tab.name("some")
    tab.merge()
    tab.page.locator("#loraclr_subset").get_by_text(TIGER.name, exact=True).click()
    tab.settle()
    assert tab.prompt == f"<lora:some:1> {PANDA.trigger}"
    links = tab.page.locator("#loraclr_downloads a")
    addresses = {link.inner_text().split()[0]: link.get_attribute("href") for link in links.all()}
    assert len(addresses) == 2, addresses
    contents = [tab.page.request.get(address).text() for address in addresses.values()]
    assert any("<!doctype html>" in content and "Effect kept" in content for content in contents)
    recipes = [json.loads(content) for content in contents if content.startswith("{")]
    assert [concept["trigger"] for concept in recipes[0]["concepts"]] == [TIGER.trigger, PANDA.trigger]
