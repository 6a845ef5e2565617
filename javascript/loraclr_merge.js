// The LoRACLR Merge tab: the webui's own progress bar and live picture, Interrupt, rows, txt2img's prompt, tooltips.

function loraclrPart(name) {
    return gradioApp().getElementById("loraclr_" + name);
}

function loraclrShowRunning(running) {
    const stop = loraclrPart("interrupt");
    stop.disabled = false;
    stop.textContent = "Interrupt";
    loraclrPart("buttons").classList.toggle("running", running);
}

let loraclrTask = null; // the latest job that this page has followed

// Follows a job, also one that another page has started, and sees to it that its result is shown.
function loraclrFollow(task, patience, answered) {
    loraclrTask = task;
    loraclrShowRunning(true);
    const end = function() {
        loraclrShowRunning(false);
        setTimeout(() => loraclrFetch(task, 12), answered ? 2000 : 0);
    };
    const panel = loraclrPart("result_panel");
    requestProgress(task, panel, panel, end, null, patience);
}

// Asks for a job's result as long as it is not shown. It comes with the answer to the click on Merge, but not to
// another page, and not if the connection broke; and while a page loads, gradio may lose a click.
function loraclrFetch(task, tries) {
    if (task != loraclrTask) return;
    if (!tries || gradioApp().querySelector('#loraclr_result [data-task="' + task + '"]')) {
        if (localGet("loraclr_task_id") == task) localRemove("loraclr_task_id");
        loraclrPart("look").click(); // there is one more earlier merge
        if (gradioApp().querySelector("#loraclr_result .loraclr-done")) loraclrListCards();
        return;
    }
    loraclrPart("restore").click();
    setTimeout(() => loraclrFetch(task, tries - 1), 5000);
}

// The new LoRA's card: the Lora pages of txt2img and img2img are as old as this page until they are asked for again.
function loraclrListCards() {
    for (const tab of ["txt2img", "img2img"]) {
        const refresh = gradioApp().getElementById(tab + "_lora_extra_refresh_internal");
        if (refresh) refresh.click();
    }
}

// The job's id goes in the place of the first value.
function loraclrMerge(values) {
    const task = randomId();
    localSet("loraclr_task_id", task);
    loraclrFollow(task, 40, true);
    return [task, ...values.slice(1)];
}

function loraclrInterrupt() {
    const stop = loraclrPart("interrupt");
    stop.disabled = true;
    stop.textContent = "Interrupting…";
    return [localGet("loraclr_task_id")];
}

function loraclrRestore() {
    return [loraclrTask];
}

function loraclrSend(prompt) {
    const field = gradioApp().querySelector("#txt2img_prompt textarea");
    field.value = prompt;
    updateInput(field);
    switch_to_txt2img();
    return [];
}

// The prompt of txt2img goes in the place of the first value.
function loraclrTake(values) {
    return [gradioApp().querySelector("#txt2img_prompt textarea").value, ...values.slice(1)];
}

// Where the LoRA of a row stands among the chosen ones, of which the rows may show a part; each begins with its name.
function loraclrPlace(chosen, row) {
    const name = loraclrPart("concept_" + row).querySelector("[data-name]").dataset.name;
    return chosen.findIndex((label) => label.split("\u2003·\u2003")[0] == name);
}

function loraclrRemove(chosen, row) {
    const place = loraclrPlace(chosen, row);
    return [chosen.filter((_, at) => at != place)];
}

function loraclrUp(chosen, row) {
    const place = loraclrPlace(chosen, row), moved = Array.from(chosen);
    if (place > 0) moved.splice(place - 1, 0, moved.splice(place, 1)[0]);
    return [moved];
}

function loraclrMore(shown) {
    loraclrPart("form").classList.toggle("loraclr-more", shown);
    return [];
}

const loraclrTips = {
    refresh: "Look into the LoRA folder again",
    up: "Move this LoRA up",
    remove: "Leave this LoRA out",
    back: "Show the LoRAs before these",
    on: "Show the LoRAs after these",
    merge: "Merge the chosen LoRAs into one file",
    interrupt: "Stop: no file is written, and the model stays as it was",
    take: "Choose the LoRAs that the txt2img prompt names, at its weights",
    every: "List LoRAs, too, that are known to be for another kind of checkpoint than the loaded one",
    hidden: "List what lies in folders whose names begin with a dot, too",
    more: "For each LoRA its weights by block, and the prompts that it is watched in",
    trigger: "The words that call this concept in a prompt",
    weight: "The strength at which this LoRA looks right alone",
    text_weight: "Weight for the text encoder; empty: the same",
    kind: "A subject is a person, an animal or a thing; a style changes how everything looks",
    blocks: "How much each block of the model gets of this LoRA",
    prompts: "The prompts that this LoRA is watched in",
    name: "The name of the file, and of the LoRA in prompts",
    replace: "Overwrite the file of this name, if there is one",
    draw: "Each concept by its own LoRA and by the merged one, and two in one picture, with the same seeds",
    against_sum: "The same pictures by all LoRAs at once, stacked at their weights",
    subset: "Which concepts' words are in the prompt below",
    send: "Put this prompt into txt2img, and go there",
    downloads: "A page with all pictures and figures, and the settings as JSON",
    load: "Put LoRAs, words, weights and settings of the merged LoRA back into the form",
};

// What a control is for, where no sentence stands beside it.
function loraclrExplain() {
    for (const [name, tip] of Object.entries(loraclrTips)) {
        const told = typeof getTranslation == "function" && getTranslation(tip) || tip;
        for (const part of gradioApp().querySelectorAll('[id^="loraclr_' + name + '"]')) {
            if (part.id.slice(8 + name.length).match(/^(_\d+)?$/)) part.title = told;
        }
    }
}

// Pictures in the list to choose from, of those that are in sight: gradio lists words only. As the background, since
// gradio fills a line with another LoRA's name when something is typed, and takes clicks on the line itself only.
const loraclrInSight = new IntersectionObserver(function(entries) {
    for (const {isIntersecting, target} of entries) {
        if (!isIntersecting) continue;
        const name = (target.getAttribute("aria-label") || target.textContent).split("\u2003·\u2003")[0];
        target.style.backgroundImage = 'url("./loraclr/thumbnail?name=' + encodeURIComponent(name) + '")';
    }
});

function loraclrShowPictures() {
    const list = loraclrPart("loras");
    if (!list || list.dataset.pictured) return;
    list.dataset.pictured = "yes";
    const look = function() {
        for (const line of list.querySelectorAll("ul.options li")) {
            if (line.dataset.pictured == line.getAttribute("aria-label")) continue;
            line.dataset.pictured = line.getAttribute("aria-label");
            loraclrInSight.unobserve(line);
            loraclrInSight.observe(line); // tells at once whether it is in sight
        }
    };
    new MutationObserver(look).observe(list, {childList: true, subtree: true, attributeFilter: ["aria-label"]});
}

onUiTabChange(function() {
    const tab = gradioApp().getElementById("tab_loraclr");
    if (tab && tab.style.display != "none") loraclrPart("look").click();
});

onOptionsAvailable(function() {
    if (loraclrPart("buttons")) loraclrExplain();
    loraclrShowPictures();
    const task = localGet("loraclr_task_id");
    if (!task || !loraclrPart("buttons")) return;
    loraclrFollow(task, 0, false);
});
