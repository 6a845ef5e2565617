// The LoRACLR Merge tab: the webui's own progress bar, the Interrupt button, and sending the prompt to txt2img.

function loraclrShowRunning(running) {
    const stop = gradioApp().getElementById("loraclr_interrupt");
    stop.disabled = false;
    stop.textContent = "Interrupt";
    gradioApp().getElementById("loraclr_buttons").classList.toggle("running", running);
}

// Follows a job, also one that was started before the page was reloaded.
function loraclrFollow(task, patience) {
    loraclrShowRunning(true);
    const end = function() {
        loraclrShowRunning(false);
        localRemove("loraclr_task_id");
    };
    requestProgress(task, gradioApp().getElementById("loraclr_result_panel"), null, end, null, patience);
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
    const stop = gradioApp().getElementById("loraclr_interrupt");
    stop.disabled = true;
    stop.textContent = "Interrupting…";
    return [localGet("loraclr_task_id")];
}

function loraclrSend(prompt) {
    const field = gradioApp().querySelector("#txt2img_prompt textarea");
    field.value = prompt;
    updateInput(field);
    switch_to_txt2img();
    return [];
}

onOptionsAvailable(function() {
    const task = localGet("loraclr_task_id");
    if (task) loraclrFollow(task, 0);
});
