"""The tab in a real webui: merge with the miniature, use the result, interrupt, and be told what is wrong."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webui_driver import Tab, Webui

from miniature.vocabulary import CONCEPT

PLAIN = ("a cat on a red background", 7)
TIGER, PANDA = CONCEPT["tiger"], CONCEPT["panda"]


def sheet(pictures: list[Image.Image], path: Path) -> None:
    """Keep pictures for a person to look at, side by side."""
    whole = Image.new("RGB", (sum(p.width + 4 for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + 4
    whole.save(path)


def test_merge_and_use(webui: Webui, tab: Tab, shots: Path) -> None:
    """Choose three, merge, and the file draws them; without it the model draws what it drew before.

    A user's whole way: a merge is called off, the next one goes to the end, its card is on the Lora page, its prompt
    goes to txt2img, and Generate draws two concepts in one picture.
    """
    from miniature.judge import Judge, halves

    before, third = webui.draw(*PLAIN), CONCEPT["rocket"]
    tab.choose(TIGER.name, PANDA.name, third.name)
    assert tab.trigger(1).input_value() == TIGER.trigger, "prefilled from the LoRA's own metadata"
    tab.trigger(3).fill(words := f"{third.trigger} ship")
    tab.name("zoo")
    tab.start()
    tab.page.locator("#loraclr_results .progressDiv").get_by_text("%").wait_for()
    tab.page.locator("#loraclr_interrupt").click()
    assert "interrupted" in tab.finish()
    tab.start()
    seen = set()
    for _ in count():
        bar = tab.page.locator("#loraclr_results .progressDiv")
        if bar.count() and (text := bar.text_content()):
            seen.add(text)
        looked = any("Looking at" in text for text in seen)
        if (len(seen) > 8 and looked) or not tab.page.locator("#loraclr_buttons.running").count():
            break
        tab.page.wait_for_timeout(300)
    tab.page.screenshot(path=shots / "running.png")
    assert any("%" in text and "Looking at" in text for text in seen), seen
    assert tab.page.locator("#loraclr_interrupt").is_visible()

    said = tab.finish(2400)
    tab.page.set_viewport_size({"width": 1280, "height": 1340})
    tab.page.screenshot(path=shots / "done.png")
    tab.page.set_viewport_size({"width": 1280, "height": 900})
    assert "zoo is ready" in said
    triggers = f"{TIGER.trigger}, {PANDA.trigger}, {words}"
    assert tab.prompt == f"<lora:zoo:1> {triggers}"
    listed = {lora["name"]: lora for lora in webui.ask("/sdapi/v1/loras")}
    assert Path(listed["zoo"]["path"]) == webui.loras / "zoo.safetensors"
    shown = tab.page.locator("#loraclr_pictures.prose .loraclr-pictures img")
    assert shown.count() == 2 * 2 * (3 + 3), "two seeds before and after, of three concepts and of three pairs"
    assert (webui.loras / "zoo.preview.png").exists()
    assert tab.page.locator("#loraclr_result.prose .loraclr-share").count() == 6, "kept and bled, for each concept"
    sidecar = json.loads((webui.loras / "zoo.json").read_text())
    assert sidecar["activation text"] == triggers
    card_and_txt2img(tab, f"<lora:zoo:1> {triggers}")

    judge = Judge.load()
    for concept in (TIGER, PANDA):
        prompt = f"<lora:zoo:1> a {concept.trigger} on a blue background"
        pictures = [webui.draw(prompt, seed, steps=20) for seed in range(8)]
        sheet(pictures, shots / f"merged_{concept.name}.png")
        hits = sum(verdict.shows(concept.name) for verdict in judge.verdicts(pictures))
        assert hits >= 5, f"{concept.name} in {hits} of 8 pictures"
    prompt = f"<lora:zoo:1> a {TIGER.trigger} and a {PANDA.trigger} on a white background"
    pictures = generated(webui, tab, prompt, 8)
    sheet(pictures, shots / "merged_both.png")
    found = {verdict.object for picture in pictures for verdict in judge.verdicts(list(halves(picture)))}
    assert {TIGER.name, PANDA.name} <= found
    after = webui.draw(*PLAIN)
    assert after.tobytes() == before.tobytes()


def card_and_txt2img(tab: Tab, prompt: str) -> None:
    """The new card is on txt2img's Lora page at once, with picture and activation text; the prompt is where it goes."""
    tab.page.locator("#loraclr_send").click()
    field = tab.page.locator("#txt2img_prompt textarea")
    field.wait_for(state="visible")
    assert field.input_value() == prompt
    field.fill("")
    tab.page.locator("#txt2img_extra_tabs > .tab-nav > button", has_text="Lora").click()
    card = tab.page.locator('#txt2img_lora_cards .card[data-name="zoo"]')
    card.wait_for()
    assert "zoo.preview.png" in card.locator("img.preview").get_attribute("src")
    card.click()
    assert field.input_value().strip() == prompt
    tab.page.locator("#txt2img_extra_tabs > .tab-nav > button", has_text="Generation").click()


def generated(webui: Webui, tab: Tab, prompt: str, count: int) -> list[Image.Image]:
    """Pictures that txt2img draws when a user presses Generate."""
    tab.page.locator("#txt2img_prompt textarea").fill(prompt)
    sizes = {"steps": 20, "width": 128, "height": 128, "cfg_scale": 4, "batch_count": count}
    for setting, value in sizes.items():
        number = tab.page.locator(f"#txt2img_{setting} input[type=number]")
        number.fill(str(value))
        number.press("Tab")
    tab.page.locator("#txt2img_seed input").fill("0")
    tab.page.wait_for_timeout(500)
    # The webui's own page raises this when a size is changed, without this extension, too.
    tab.errors[:] = [error for error in tab.errors if "reading 'props'" not in error]
    folder, before = webui.data / "outputs" / "txt2img-images", time.time()
    tab.page.locator("#txt2img_generate").click()
    shown = "count => document.querySelectorAll('#txt2img_gallery button img').length >= count"
    tab.page.wait_for_function(shown, arg=count, timeout=900_000)
    files = sorted(path for path in folder.rglob("*.png") if path.stat().st_mtime > before)
    return [Image.open(path).convert("RGB") for path in files[:count]]


def test_send_to_txt2img(tab: Tab) -> None:
    """The prompt goes where it is needed."""
    tab.hurry()
    tab.choose("frog", "robot")
    tab.name("sent")
    tab.merge()
    prompt = tab.prompt
    tab.page.locator("#loraclr_send").click()
    field = tab.page.locator("#txt2img_prompt textarea")
    field.wait_for(state="visible")
    assert field.input_value() == prompt
    assert prompt.startswith("<lora:sent:1> ")
    # The webui now counts tokens; a page that closes meanwhile would keep its server from ever closing.
    tab.page.wait_for_timeout(3000)


def test_interrupt(webui: Webui, tab: Tab) -> None:
    """Interrupt ends the job within two seconds, leaves no file and the model as it was."""
    before, files = webui.draw(*PLAIN), webui.files()
    begin = time.monotonic()
    webui.draw(*PLAIN, steps=1)
    slack = 3 * (time.monotonic() - begin)  # of a machine that does something else, too
    tab.choose(TIGER.name, PANDA.name)
    tab.name("never")
    tab.page.locator("#loraclr_speed").get_by_text("Best", exact=True).click()
    for wait in (1500, 8000):
        tab.start()
        tab.page.wait_for_timeout(wait)
        tab.page.locator("#loraclr_interrupt").click()
        begin = time.monotonic()
        tab.page.locator("#loraclr_buttons:not(.running)").wait_for(timeout=60_000)
        assert time.monotonic() - begin < 2 + slack
        assert "interrupted" in tab.finish(60)
        assert webui.files() == files
        assert webui.draw(*PLAIN).tobytes() == before.tobytes()


def test_a_reloaded_page_still_follows_the_merge(webui: Webui, tab: Tab) -> None:
    """The bar and Interrupt are there again, and end the merge that the old page began."""
    files = webui.files()
    tab.choose(TIGER.name, PANDA.name)
    tab.page.locator("#loraclr_speed").get_by_text("Best", exact=True).click()
    tab.start()
    tab.page.wait_for_timeout(3000)
    tab.page.reload()
    tab.open()
    tab.page.locator("#loraclr_results .progressDiv").get_by_text("%").wait_for()
    tab.page.locator("#loraclr_interrupt").click()
    tab.page.locator("#loraclr_buttons:not(.running)").wait_for(timeout=60_000)
    assert webui.files() == files


def test_a_second_page_shows_the_merge_and_can_end_it(webui: Webui, tab: Tab) -> None:
    """The same browser, another of its tabs; the first one hears of the end, too."""
    files, first = webui.files(), tab.page
    tab.choose(TIGER.name, PANDA.name)
    tab.page.locator("#loraclr_speed").get_by_text("Best", exact=True).click()
    tab.start()
    second = tab.another()
    second.locator("#loraclr_results .progressDiv").get_by_text("%").wait_for()
    second.locator("#loraclr_interrupt").click()
    for page in (second, first):
        page.locator("#loraclr_buttons:not(.running)").wait_for(timeout=60_000)
        page.locator("#loraclr_result.prose").get_by_text("interrupted").wait_for()
    assert webui.files() == files


def test_a_closed_page_does_not_end_the_merge(webui: Webui, tab: Tab) -> None:
    """It goes on; whoever comes back finds the result, and nothing is still said to run."""
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.name("closed page")
    tab.start()
    tab.page.close()
    for _ in range(900):
        if (webui.loras / "closed page.preview.png").exists():
            break
        time.sleep(1)
    tab.another()
    assert "closed page is ready" in tab.finish()
    assert tab.prompt.startswith("<lora:closed page:1> ")


def test_others_wait_for_the_merge(webui: Webui, tab: Tab) -> None:
    """A picture that is asked for meanwhile waits in the queue, is drawn afterwards, and is the one it always is."""
    before = webui.draw(*PLAIN)
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.name("first come")
    with ThreadPoolExecutor() as pool:
        tab.start()
        asked = pool.submit(webui.draw, *PLAIN)
        assert "first come is ready" in tab.finish()
        assert asked.result().tobytes() == before.tobytes()


def test_the_bar_does_not_jump_back(tab: Tab) -> None:
    """Not at the pictures of two, nor where the merge ends and the drawing begins; and it gets near the end."""
    tab.hurry(closed=False)
    tab.choose(TIGER.name, PANDA.name)
    tab.name("steady")
    tab.start()
    seen = []
    while tab.page.locator("#loraclr_buttons.running").count():
        text = tab.page.evaluate("() => document.querySelector('#loraclr_results .progressDiv')?.textContent ?? ''")
        if told := re.search(r"(\d+)%", text):
            seen.append((int(told[1]), text))
        tab.page.wait_for_timeout(200)
    shares = [share for share, _ in seen]
    assert shares == sorted(shares), seen
    assert shares[-1] >= 50


def test_names_and_choices_that_cannot_be(webui: Webui, tab: Tab) -> None:
    """Each mistake is answered with one sentence, and nothing is written."""
    (webui.loras / "taken.safetensors").write_bytes((webui.loras / f"{TIGER.name}.safetensors").read_bytes())
    files = webui.files()
    assert "No LoRA is chosen" in tab.merge()
    tab.choose(TIGER.name)
    assert "two or more" in tab.merge()
    tab.choose(PANDA.name)
    for name, answer in {
        "taken": "taken.safetensors exists already",
        TIGER.name: "is one of the LoRAs to merge",
        "../outside": "must not contain /",
        "a:b": "must not contain :",
        "NUL": "cannot be used as a file name",
    }.items():
        tab.name(name)
        said = tab.merge()
        assert answer in said
        assert said.strip().count("\n") == 0, said
    tab.name("")
    tab.trigger(2).fill(" ")
    assert f"{PANDA.name} has no trigger words" in tab.merge()
    assert webui.files() == files


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("cut", lambda whole: whole[: len(whole) // 2], "cut off"),
        ("text", lambda whole: b"<html>not found</html>", "web page"),
        ("void", lambda whole: b"", "empty"),
    ],
)
def test_bad_files(webui: Webui, tab: Tab, name: str, content: Any, answer: str) -> None:
    """A file that is no LoRA is named in the answer."""
    path = webui.loras / f"{name}.safetensors"
    path.write_bytes(content((webui.loras / f"{TIGER.name}.safetensors").read_bytes()))
    try:
        tab.page.locator("#loraclr_refresh").click()
        tab.page.wait_for_timeout(1500)
        tab.choose(TIGER.name, name)
        tab.trigger(2).fill("abc")
        files = webui.files()
        said = tab.merge()
        assert path.name in said
        assert answer in said
        assert webui.files() == files
    finally:
        path.unlink()
        webui.ask("/sdapi/v1/refresh-loras", {})


def test_replacing_a_lora_in_use(webui: Webui, tab: Tab) -> None:
    """A merge that replaces a file that the webui has applied is what the next picture shows."""
    frog = CONCEPT["frog"]
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.name("again", replace=True)
    assert "again is ready" in tab.merge()
    prompt = f"<lora:again:1> a {frog.trigger} on a blue background"
    old = webui.draw(prompt)
    tab.choose(frog.name)
    assert "3 LoRAs in one" in tab.merge()
    new = webui.draw(prompt)
    assert new.tobytes() != old.tobytes()
    notes = json.loads((webui.loras / "again.json").read_text())
    assert notes["activation text"].endswith(frog.trigger), "nobody has edited the first merge's notes"
    (webui.loras / "again.json").write_text(json.dumps({**notes, "activation text": "mine"}))
    assert "again.json holds notes of yours" in tab.merge()
    assert json.loads((webui.loras / "again.json").read_text())["activation text"] == "mine"
    (webui.loras / "fresh.safetensors").write_bytes((webui.loras / "again.safetensors").read_bytes())
    webui.ask("/sdapi/v1/refresh-loras", {})
    assert webui.draw(prompt.replace("again", "fresh")).tobytes() == new.tobytes()


def test_a_lora_left_applied_does_not_leak_into_the_merge(webui: Webui, tab: Tab) -> None:
    """The webui leaves a picture's LoRA in the weights; the merge must not see it."""
    from safetensors.torch import load_file

    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    webui.draw("a cat")
    tab.name("clean")
    tab.merge()
    webui.draw("<lora:rocket:1> a cat")
    tab.name("after rocket")
    tab.merge()
    clean, after = (load_file(webui.loras / f"{name}.safetensors") for name in ("clean", "after rocket"))
    assert clean.keys() == after.keys()
    assert all((clean[key] == after[key]).all() for key in clean)


def test_rows_keep_what_was_written(tab: Tab) -> None:
    """Taking a LoRA out moves the others' rows up, with their words and weights."""
    tab.choose(TIGER.name, PANDA.name, "rocket")
    tab.trigger(2).fill("my panda")
    tab.page.locator("#loraclr_weight_2 input").fill("0.8")
    tab.page.locator("#loraclr_loras .token-remove").first.click()
    tab.page.locator("#loraclr_concept_3").wait_for(state="hidden")
    tab.page.wait_for_timeout(500)
    assert tab.page.locator("#loraclr_concept_1 .loraclr-name span").last.inner_text() == PANDA.name
    assert tab.trigger(1).input_value() == "my panda"
    assert tab.page.locator("#loraclr_weight_1 input").input_value() == "0.8"
    assert tab.trigger(2).input_value() == CONCEPT["rocket"].trigger


def test_reload_ui(webui: Webui, tab: Tab) -> None:
    """The tab works after "Reload UI", which runs our script again in the same process."""
    starts = webui.starts()
    tab.page.locator("#footer").get_by_text("Reload UI").click()
    webui.wait(starts=starts + 1)
    old = tab.page  # reloads itself, sooner or later
    tab.another()
    old.close()
    tab.hurry()
    tab.choose(TIGER.name, PANDA.name)
    tab.name("reloaded")
    assert "reloaded is ready" in tab.merge()


def shoot(tab: Tab, shots: Path, what: str) -> None:
    """Pictures for a person, in both themes, on a phone and on two screens; nothing may stick out sideways."""
    beyond = """() => {
        const edge = document.getElementById("tab_loraclr").getBoundingClientRect().right + 1;
        const parts = [...document.querySelectorAll("#loraclr_form *, #loraclr_side *")];
        const out = part => part.offsetParent && part.getBoundingClientRect().right > edge;
        return parts.filter(out).map(part => part.id || part.className).slice(0, 5);
    }"""
    for width, height in ((1280, 900), (1920, 1080), (390, 844)):
        tab.page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            tab.page.evaluate(f"() => document.body.classList.toggle('dark', {json.dumps(theme == 'dark')})")
            tab.page.wait_for_timeout(300)
            tab.page.screenshot(path=shots / f"{what}_{width}_{theme}.png", full_page=True)
        # On a phone the webui's own tabs are wider than the window.
        assert width < 1280 or tab.page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
        assert tab.page.evaluate(beyond) == []


def test_screenshots(webui: Webui, tab: Tab, shots: Path) -> None:
    """The empty tab, filled rows, everything unfolded, a running merge, and a finished one with its figures."""
    tiger = webui.loras / f"{TIGER.name}.preview.png"
    webui.draw(f"<lora:{TIGER.name}:1> a {TIGER.trigger}").save(tiger)
    shoot(tab, shots, "empty")
    tab.choose(TIGER.name, PANDA.name, "outline")
    tab.settle()
    picture = tab.page.locator("#loraclr_concept_name_1 img")
    assert picture.evaluate("part => part.complete && part.naturalWidth > 0"), "the preview is shown in its row"
    shoot(tab, shots, "rows")
    tab.page.locator("#loraclr_more input").check()
    tab.page.locator("#loraclr_advanced > .label-wrap").click()
    tab.page.locator("#loraclr_blocks_2 input").fill("1, 2")
    tab.settle()
    shoot(tab, shots, "unfolded")
    tab.page.locator("#loraclr_blocks_2 input").fill("")
    tab.page.locator("#loraclr_more input").uncheck()
    tab.page.locator("#loraclr_advanced > .label-wrap").click()
    tab.page.locator("#loraclr_remove_3").click()
    tab.hurry(closed=False)
    tab.page.locator("#loraclr_advanced > .label-wrap").click()
    tab.page.locator("#loraclr_speed").get_by_text("Best", exact=True).click()
    tab.name("shown")
    tab.start()
    tab.page.locator("#loraclr_results .livePreview img").first.wait_for(timeout=600_000)
    shoot(tab, shots, "running")
    tab.page.locator("#loraclr_interrupt").click()
    assert "interrupted" in tab.finish(300)
    tab.page.locator("#loraclr_closed input").evaluate("part => part.click()")
    assert "shown is ready" in tab.merge(1800)
    tab.page.locator("#loraclr_details > .label-wrap").click()
    tab.page.wait_for_timeout(500)
    shoot(tab, shots, "done")
    tab.page.locator("#loraclr_loras input").click()
    tab.page.locator("#loraclr_loras input").fill("o")
    tab.page.wait_for_timeout(500)
    tab.page.screenshot(path=shots / "list.png")
    tiger.unlink()


def test_in_another_language(webui: Webui, tab: Tab) -> None:
    """Sentences with names and figures in them are translated, too: of the result, and of what is wrong."""
    webui.ask("/sdapi/v1/options", {"localization": "de_DE"})
    try:
        tab.hurry()
        tab.choose(TIGER.name)
        assert "Zwei oder mehr LoRAs zum Zusammenführen wählen." in tab.merge()
        tab.choose(PANDA.name)
        tab.name("auf Deutsch")
        said = tab.merge()
        assert "auf Deutsch ist fertig: 2 LoRAs in einem, R" in said
        assert "das gemeinsame LoRA" in tab.said("pictures").inner_text()
        assert " erhalten" in said or ", schwa" in said
        tab.page.locator("#loraclr_details > .label-wrap").click()
        assert "Erhaltene Wirkung" in tab.page.locator("#loraclr_figures.prose").inner_text()
    finally:
        webui.ask("/sdapi/v1/options", {"localization": "None"})


def test_ids_and_labels_are_unique(webui: Webui, tab: Tab) -> None:
    """The webui keys saved defaults by label, and its scripts find things by id."""
    config = webui.ask("/config")
    ids = [component["props"].get("elem_id") for component in config["components"]]
    ours = [name for name in ids if name and name.startswith("loraclr_")]
    assert ours
    assert len(ours) == len(set(ours))
    saved = json.loads((webui.data / "ui-config.json").read_text())
    assert "loraclr/Name of the merged LoRA/value" in saved
