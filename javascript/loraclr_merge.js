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

// Follows a job, also one that another page has started; `ended` is called after its end.
function loraclrFollow(task, patience, ended) {
    loraclrShowRunning(true);
    const end = function() {
        loraclrShowRunning(false);
        localRemove("loraclr_task_id");
        if (ended) ended();
    };
    const panel = loraclrPart("result_panel");
    requestProgress(task, panel, panel, end, null, patience);
}

function loraclrMerge() {
    const task = randomId();
    localSet("loraclr_task_id", task);
    loraclrFollow(task);
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

let loraclrEnded = null; // the job whose result this page has not been told

function loraclrRestore() {
    return [loraclrEnded];
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
    // Asked for at the end only: while a page loads, gradio may lose a click.
    loraclrFollow(task, 0, function() {
        loraclrEnded = task;
        loraclrPart("restore").click();
    });
});
