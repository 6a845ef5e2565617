"""The tab as a page of its own, in a browser: the steps of tests/webui/test_merge_tab.py that need no webui."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alone_driver import Alone, Page
from PIL import Image
from safetensors import safe_open

from loraclr import files
from loraclr.webui.view import MOST

TIGER, PANDA = "tiger", "panda"


def test_merge(alone: Alone, tab: Page, shots: Path) -> None:
    """Choose two, edit a trigger, merge, see how far it is, and read off the prompt, the file and the pictures."""
    tab.hurry()
    tab.page.locator("#loraclr_seed input").fill("-1")
    tab.choose(TIGER, PANDA)
    assert tab.trigger(1).input_value() == "sks", "prefilled from the LoRA's own metadata"
    tab.trigger(2).fill("my bear")
    tab.page.locator("#loraclr_against_sum input").check()
    tab.name("zoo")
    tab.settle()
    assert tab.said("note").inner_text().startswith("zoo.safetensors, about ")
    tab.start()
    bar = tab.page.locator("#loraclr_results .progressDiv")
    bar.get_by_text("%").wait_for()
    assert tab.page.locator("#loraclr_interrupt").is_visible()
    assert "zoo is ready" in tab.finish()
    assert bar.count() == 0
    assert tab.prompt == "<lora:zoo:1> sks, my bear"
    assert {"zoo.safetensors", "zoo.json", "zoo.preview.png"} <= alone.files()
    with safe_open(alone.loras / "zoo.safetensors", framework="pt") as file:
        recipe = json.loads(file.metadata()["loraclr.recipe"])
    assert [concept["prompts"] for concept in recipe["concepts"]] == [[], []], "the usual ones"
    assert recipe["settings"]["seed"] > 0, "a random one, but one for all of the merge, that can be told again"
    assert tab.said("result").locator(".loraclr-share").count() == 4, "kept and bled, for each concept"
    assert tab.said("pictures").locator(".loraclr-pictures img").count() == 2 * 3 * (2 + 1)
    tab.page.locator("#loraclr_details > .label-wrap").click()
    figures = tab.said("figures").inner_text()
    for title in ("Effect kept", "Bled in", "Layer by layer", "Hinge active", "Ranks", "Time taken", "Memory needed"):
        assert title in figures
    links = [link.get_attribute("href") for link in tab.page.locator("#loraclr_downloads a").all()]
    assert any("Effect kept" in tab.page.request.get(link).text() for link in links)
    tab.page.screenshot(path=shots / f"alone_{alone.port}.png", full_page=True)


def test_a_rank_for_each_layer(alone: Alone, tab: Page) -> None:
    """Rank auto, by weights alone: Details say which ranks the layers got, and what of ‖ΔW‖² is left at least."""
    tab.hurry()
    tab.choose(TIGER, PANDA)
    tab.page.locator("#loraclr_draw input").uncheck()
    for field, value in (("rank", "auto"), ("method", "svd")):
        tab.page.locator(f"#loraclr_{field} input").click()
        tab.page.locator(f'#loraclr_{field} ul.options li[aria-label="{value}"]').click()
    tab.name("ranks")
    tab.start()
    assert "ranks is ready" in tab.finish()
    merged = files.load(alone.loras / "ranks.safetensors")
    kept = json.loads(merged.metadata["loraclr.recipe"])["kept"]
    ranks = {name: layer.rank for name, layer in merged.layers.items()}
    assert len(set(ranks.values())) > 3
    tab.page.locator("#loraclr_details > .label-wrap").click()
    table = tab.page.locator("#loraclr_figures table", has_text="Kept at least")
    shown = [[cell.inner_text() for cell in row.locator("td").all()] for row in table.locator("tr").all()[1:]]
    assert [(int(rank), int(layers)) for rank, layers, _ in shown] == sorted(Counter(ranks.values()).items())
    for rank, _, share in shown:
        least = min(kept[name] for name in ranks if ranks[name] == int(rank))
        assert float(share.rstrip("%")) == pytest.approx(100 * least, abs=0.06) and least >= 0.995


@pytest.fixture
def many(alone: Alone, tab: Page) -> Iterator[list[str]]:
    """More LoRAs than there are rows, in a folder of their own, and a merge of them that can be loaded."""
    folder, names = alone.loras / "many", [f"copy {number:02}" for number in range(1, MOST + 7)]
    folder.mkdir()
    for name in names:
        shutil.copy(alone.loras / f"{TIGER}.safetensors", folder / f"{name}.safetensors")
    tab.page.locator("#loraclr_refresh").click()
    tab.settle()
    order = {"loras": [{"name": name, "trigger": f"word{name[-2:]}"} for name in names], "method": "average"}
    job = alone.ask("/loraclr/v1/merge", {**order, "name": "of many", "draw": False, "settings": {"rank": 4}})["job"]
    while alone.ask(f"/loraclr/v1/jobs/{job}")["state"] in ("queued", "running"):
        time.sleep(0.5)
    yield names
    shutil.rmtree(folder)
    tab.page.locator("#loraclr_refresh").click()
    tab.settle()


def test_more_loras_than_rows(alone: Alone, tab: Page, many: list[str], shots: Path) -> None:
    """Pages of rows: what is written on one stays, moved or not, and Merge takes all in their order."""
    place = tab.said("place")
    tab.page.locator("#loraclr_history > .label-wrap").click()
    merged = tab.page.locator('#loraclr_merged ul.options li[aria-label="of many"]')
    for _ in range(20):  # gradio 3 forgets a click if the page's own first one is not answered yet
        tab.page.locator("#loraclr_look").dispatch_event("click")
        tab.settle()
        tab.page.locator("#loraclr_merged input").click()
        if merged.is_visible():
            break
        tab.page.keyboard.press("Escape")
        tab.page.locator("#loraclr_merged input").blur()
    merged.click()
    tab.settle()
    assert not place.is_visible()
    tab.page.locator("#loraclr_load").click()
    place.get_by_text(f"LoRAs 1–{MOST} of {len(many)}").wait_for()
    tab.settle()  # gradio greys rows that it still fills
    assert tab.names() == many[:MOST]
    assert tab.page.locator("#loraclr_back").is_disabled()
    tab.trigger(2).fill("second")
    tab.page.locator("#loraclr_weight_3 input").fill("0.5")

    tab.page.locator("#loraclr_on").click()
    place.get_by_text(f"LoRAs {MOST + 1}–{len(many)} of {len(many)}").wait_for()
    tab.settle()
    assert tab.names() == many[MOST:]
    assert tab.page.locator("#loraclr_on").is_disabled()
    tab.trigger(1).fill("first of the others")
    tab.page.locator("#loraclr_up_1").click()  # to the page before
    tab.settle()
    assert tab.names() == [many[MOST - 1], *many[MOST + 1 :]]
    tab.page.locator("#loraclr_remove_2").click()
    tab.settle()
    assert tab.names() == [many[MOST - 1], *many[MOST + 2 :]]

    tab.page.locator("#loraclr_back").click()
    place.get_by_text(f"LoRAs 1–{MOST} of {len(many) - 1}").wait_for()
    assert tab.names() == [*many[: MOST - 1], many[MOST]]
    assert tab.trigger(MOST).input_value() == "first of the others"
    assert tab.trigger(2).input_value() == "second"
    tab.choose(PANDA)  # its page is shown
    assert tab.names()[-1] == PANDA
    tab.page.screenshot(path=shots / f"pages_{alone.port}.png", full_page=True)

    tab.page.locator("#loraclr_draw input").uncheck()
    tab.name("most of many")
    tab.start()
    assert "most of many is ready" in tab.finish()
    with safe_open(alone.loras / "most of many.safetensors", framework="pt") as file:
        concepts = json.loads(file.metadata()["loraclr.recipe"])["concepts"]
    order = [*many[: MOST - 1], many[MOST], many[MOST - 1], *many[MOST + 2 :], PANDA]
    words = {name: f"word{name[-2:]}" for name in many} | {many[1]: "second", many[MOST]: "first of the others"}
    assert [Path(concept["file"]).stem for concept in concepts] == order
    assert [concept["trigger"] for concept in concepts[:-1]] == [words[name] for name in order[:-1]]
    assert [concept["weight"] for concept in concepts] == [0.5 if name == many[2] else 1.0 for name in order]
    for _ in range(len(order) - MOST):
        tab.page.locator("#loraclr_remove_1").click()
        tab.settle()
    assert not place.is_visible()
    assert len(tab.names()) == MOST


def test_pictures_in_the_list(alone: Alone, tab: Page, shots: Path) -> None:
    """Of LoRAs that have one, small, also when what is typed puts another LoRA into a line; and a click chooses."""
    names = ('odd "name" (1)', "odd plain")
    made = [alone.loras / f"{name}.safetensors" for name in names]
    for path in made:
        shutil.copy(alone.loras / f"{TIGER}.safetensors", path)
    made.append(alone.loras / f"{names[0]}.preview.png")
    Image.new("RGB", (600, 300), "red").save(made[-1])

    def picture(name: str) -> Any:
        """What the line of this LoRA has, asked for as the browser does."""
        line = tab.page.locator("#loraclr_loras ul.options li", has_text=name)
        tab.page.wait_for_function("line => line.style.backgroundImage", arg=line.element_handle())
        address = line.evaluate("line => line.style.backgroundImage").removeprefix('url("').removesuffix('")')
        return tab.page.request.get(f"{alone.address}/{address.removeprefix('./')}")

    try:
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()
        field = tab.page.locator("#loraclr_loras input")
        field.click()
        field.fill("odd")
        with Image.open(io.BytesIO(picture(names[0]).body())) as small:
            assert small.size == (96, 96) and small.convert("RGB").getpixel((5, 5)) == (255, 0, 0)
        tab.page.screenshot(path=shots / f"list_{alone.port}.png")
        assert picture(names[1]).status == 204
        for typed, status in (("plain", 204), ("name", 200)):
            field.fill(typed)
            tab.page.locator("#loraclr_loras ul.options li").nth(1).wait_for(state="detached")
            assert picture("odd").status == status
        tab.page.locator("#loraclr_loras ul.options li").click(position={"x": 10, "y": 8})
        tab.page.locator("#loraclr_concept_1").wait_for()
        tab.settle()
        assert tab.names() == [names[0]]
        shown = tab.page.locator("#loraclr_concept_name_1 img")
        assert shown.evaluate("image => [image.complete, image.naturalWidth]") == [True, 96]
    finally:
        for path in made:
            path.unlink()


def test_a_row(tab: Page) -> None:
    """Its usual prompts are there to be edited and follow the kind, until they are; controls say what they are for."""
    tab.page.locator("#loraclr_more input").check()
    tab.choose(TIGER)
    prompts = tab.page.locator("#loraclr_prompts_1 textarea")

    def choose_kind(kind: str) -> None:
        tab.page.locator("#loraclr_kind_1").get_by_text(kind, exact=True).click()
        tab.settle()

    def begin(first: str) -> None:
        tab.page.wait_for_function(
            "first => document.querySelector('#loraclr_prompts_1 textarea').value.split('\\n')[0] == first", arg=first
        )

    begin("a photo of a {}")
    choose_kind("Style")
    begin("a photo of a car in {}")
    prompts.fill("my {}")
    choose_kind("Subject")
    assert prompts.input_value() == "my {}"
    for part, tip in {
        "refresh": "folder again",
        "up_1": "up",
        "trigger_1": "words that call",
        "merge": "one file",
    }.items():
        assert tip in tab.page.locator(f"#loraclr_{part}").get_attribute("title")


def test_what_a_webui_has_is_not_there(tab: Page) -> None:
    """No button that needs txt2img."""
    assert not tab.page.locator("#loraclr_take").is_visible()
    assert not tab.page.locator("#loraclr_send").is_visible()


def test_progress_and_interrupt(alone: Alone, tab: Page) -> None:
    """The bar tells stage, share and time left; a reloaded page has it again; Interrupt ends the job soon."""
    files = alone.files()
    tab.hurry(closed=False)
    tab.choose(TIGER, PANDA)
    tab.page.locator("#loraclr_speed").get_by_text("Best", exact=True).click()
    tab.start()
    bar = tab.page.locator("#loraclr_results .progressDiv")
    bar.get_by_text("left").wait_for()
    assert re.fullmatch(r"(Looking at|Fitting|Learning|Polishing).*: \d+%, \d+:\d\d left", bar.text_content())
    tab.page.reload()
    tab.open()
    bar.get_by_text("left").wait_for()
    tab.page.locator("#loraclr_interrupt").click()
    since = time.monotonic()
    tab.page.locator("#loraclr_buttons:not(.running)").wait_for(timeout=30_000)
    print(f"interrupted after {time.monotonic() - since:.1f} s")
    tab.said("result").get_by_text("interrupted").wait_for()
    assert alone.files() == files


def test_a_long_merge(alone: Alone, tab: Page) -> None:
    """Its result is shown, too: gradio 3's own queue forgets what takes longer than 5 s."""
    tab.hurry()
    tab.choose(TIGER, PANDA)
    tab.name("long")
    tab.start()
    tab.page.locator("#loraclr_results .progressDiv").wait_for()
    with alone.stopped():
        time.sleep(6)
    assert "long is ready" in tab.finish()


def test_a_lost_answer(alone: Alone, tab: Page) -> None:
    """The page asks for the result again."""
    if not alone.ask("/config")["version"].startswith("3."):
        pytest.skip("gradio 4 answers by a stream of events, which the browser here cannot break")
    lost = []

    def lose(route: Any) -> None:
        if not lost and '"task(' in (route.request.post_data or ""):
            lost.append(route.fetch(timeout=600_000).status)
            route.abort()
        else:
            route.continue_()

    tab.page.route("**/run/predict", lose)
    tab.hurry(method="sum")
    tab.choose(TIGER, PANDA)
    tab.name("lost")
    tab.start()
    assert "lost is ready" in tab.finish()
    assert lost == [200]
    assert tab.prompt.startswith("<lora:lost:1> ")
    assert all("ERR_FAILED" in line for line in tab.console), tab.console
    tab.console.clear()


def test_an_earlier_merge(alone: Alone, tab: Page) -> None:
    """Its settings come back; a LoRA that is gone since is named."""
    guest = alone.loras / "guest.safetensors"
    guest.write_bytes((alone.loras / f"{PANDA}.safetensors").read_bytes())
    tab.page.locator("#loraclr_refresh").click()
    tab.settle()
    tab.hurry(method="sum")
    tab.choose(TIGER, guest.stem)
    tab.page.locator("#loraclr_draw input").uncheck()
    tab.name("kept")
    tab.start()
    tab.finish()
    tab.page.locator("#loraclr_remove_1").click()
    tab.settle()
    guest.unlink()
    tab.page.locator("#loraclr_refresh").click()
    tab.settle()
    tab.page.reload()
    tab.open()
    tab.page.locator("#loraclr_history > .label-wrap").click()
    tab.page.locator("#loraclr_load").click()
    about = tab.said("merged_about")
    about.get_by_text("Choose one of the merged LoRAs first.").wait_for()
    tab.page.locator("#loraclr_merged input").click()
    tab.page.locator('#loraclr_merged ul.options li[aria-label="kept"]').click()
    tab.settle()
    tab.page.locator("#loraclr_load").click()
    about.get_by_text("No longer in the LoRA folder: guest.safetensors.").wait_for()
    tab.settle()
    assert tab.names() == [TIGER]
    assert tab.page.locator("#loraclr_method input").input_value() == "sum"


def test_a_second_look(alone: Alone, tab: Page) -> None:
    """A click that comes before the one before it is answered is answered, too."""
    if alone.ask("/config")["version"].startswith("3."):
        pytest.skip("gradio 3 forgets such a click, and cannot be told not to")
    tab.settle()
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    with alone.stopped():
        for _ in range(2):
            tab.page.locator("#loraclr_refresh").click()
            tab.page.wait_for_timeout(500)
    tab.settle()
    assert sum("/queue/join" in url for url in asked) == 2


def test_mistakes(alone: Alone, tab: Page) -> None:
    """One sentence each."""
    files = alone.files()
    assert "No LoRA is chosen" in tab.merge()
    tab.choose(TIGER, PANDA)
    tab.name("a:b")
    assert "must not contain :" in tab.merge()
    assert alone.files() == files


def test_keyboard_only(alone: Alone, tab: Page) -> None:
    """Nothing needs a mouse: choosing, naming, merging."""
    tab.hurry(method="sum")
    tab.expect()
    keyboard = tab.page.keyboard

    def tab_to(part: str) -> None:
        for _ in range(60):
            if tab.page.evaluate(f"() => !!document.activeElement.closest('#loraclr_{part}')"):
                return
            keyboard.press("Tab")
        raise AssertionError(f"the Tab key does not reach {part}")

    tab_to("loras")
    for number, name in enumerate((TIGER, PANDA), 1):
        keyboard.type(name)
        # The list opens whole, and Enter takes its first line: the right one only once gradio has heard what was typed.
        tab.page.wait_for_function(
            "name => (document.querySelector('#loraclr_loras ul.options li')?.getAttribute('aria-label') ?? '')"
            ".split('\u2003')[0] == name",
            arg=name,
        )
        keyboard.press("Enter")
        tab.page.locator(f'#loraclr_concept_{number} [data-name="{name}"]').wait_for()
    tab.settle()
    tab_to("trigger_2")
    keyboard.press("End")
    keyboard.type(" bear")
    tab_to("name")
    keyboard.type("keys")
    tab_to("draw")
    keyboard.press("Space")
    tab_to("merge")
    keyboard.press("Enter")
    assert "keys is ready" in tab.finish()
    assert tab.prompt == "<lora:keys:1> sks, zyk bear"
    assert "keys.preview.png" not in alone.files()
