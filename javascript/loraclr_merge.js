// The LoRACLR Merge tab: the webui's own progress bar and live picture, the Interrupt button, rows, and txt2img's prompt.

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
        return;
    }
    loraclrPart("restore").click();
    setTimeout(() => loraclrFetch(task, tries - 1), 5000);
}

function loraclrMerge() {
    const task = randomId();
    localSet("loraclr_task_id", task);
    loraclrFollow(task, 40, true);
    const values = Array.from(arguments);
    values[0] = task;
    return values;
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
function loraclrTake() {
    const values = Array.from(arguments);
    values[0] = gradioApp().querySelector("#txt2img_prompt textarea").value;
    return values;
}

function loraclrRemove(chosen, place) {
    return [chosen.filter((_, at) => at != place)];
}

function loraclrUp(chosen, place) {
    const moved = Array.from(chosen);
    if (place > 0) moved.splice(place - 1, 0, moved.splice(place, 1)[0]);
    return [moved];
}

function loraclrMore(shown) {
    loraclrPart("form").classList.toggle("loraclr-more", shown);
    return [];
}

onUiTabChange(function() {
    const tab = gradioApp().getElementById("tab_loraclr");
    if (tab && tab.style.display != "none") loraclrPart("look").click();
});

onOptionsAvailable(function() {
    const task = localGet("loraclr_task_id");
    if (!task || !loraclrPart("buttons")) return;
    loraclrFollow(task, 0, false);
});
