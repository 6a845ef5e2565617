// The LoRACLR Merge tab: the webui's own progress bar, the Interrupt button, and sending the prompt to txt2img.

let loraclrTask = "";

function loraclrShowRunning(running) {
    const buttons = gradioApp().getElementById("loraclr_buttons");
    const stop = gradioApp().getElementById("loraclr_interrupt");
    buttons.classList.toggle("running", running);
    stop.disabled = false;
    stop.textContent = "Interrupt";
}

function loraclrMerge() {
    loraclrTask = randomId();
    loraclrShowRunning(true);
    const panel = gradioApp().getElementById("loraclr_result_panel");
    requestProgress(loraclrTask, panel, null, () => loraclrShowRunning(false));
    const values = Array.from(arguments);
    values[0] = loraclrTask;
    return values;
}

function loraclrInterrupt() {
    const stop = gradioApp().getElementById("loraclr_interrupt");
    stop.disabled = true;
    stop.textContent = "Interrupting…";
    return [loraclrTask];
}

function loraclrSend(prompt) {
    const field = gradioApp().querySelector("#txt2img_prompt textarea");
    field.value = prompt;
    updateInput(field);
    switch_to_txt2img();
    return [];
}
