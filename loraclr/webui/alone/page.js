// What loraclr_merge.js uses of the webui's page, for a page without one; and the progress bar.

function gradioApp() {
    return document;
}

function randomId() {
    const numbers = crypto.getRandomValues(new Uint32Array(3));
    return "task(" + Array.from(numbers, (number) => number.toString(36)).join("") + ")";
}

// Private windows may have no storage: the page then forgets its job when it is reloaded, and nothing else.
function localSet(name, value) {
    try {
        localStorage.setItem(name, value);
    } catch (error) {
        window.loraclrKept = {...window.loraclrKept, [name]: value};
    }
}

function localGet(name) {
    try {
        return localStorage.getItem(name);
    } catch (error) {
        return (window.loraclrKept || {})[name] || null;
    }
}

function localRemove(name) {
    try {
        localStorage.removeItem(name);
    } catch (error) {
        delete (window.loraclrKept || {})[name];
    }
}

// There is one tab, which is open; its parts are there when this runs.
function onUiTabChange(then) {
    setTimeout(then, 0);
}

function onOptionsAvailable(then) {
    setTimeout(then, 0);
}

let loraclrWords = {};

function loraclrSay(sentence, values) {
    return (loraclrWords[sentence] || sentence).replace(/{(\w+)}/g, (_, name) => values[name]);
}

// Translates the page's fixed strings, and those that it gets later, as the webui does: texts, placeholders, tooltips.
function loraclrTranslate(words) {
    loraclrWords = words;
    function translate(node) {
        if (node.nodeType == Node.TEXT_NODE) {
            const said = node.data.trim();
            if (Object.hasOwn(words, said)) node.data = node.data.replace(said, () => words[said]);
        } else if (node.nodeType == Node.ELEMENT_NODE && !["SCRIPT", "STYLE", "TEXTAREA"].includes(node.tagName)) {
            for (const name of ["placeholder", "title"]) {
                const said = node.getAttribute(name);
                if (said && Object.hasOwn(words, said)) node.setAttribute(name, words[said]);
            }
            node.childNodes.forEach(translate);
        }
    }
    if (!Object.keys(words).length) return;
    translate(document.body);
    new MutationObserver(function(changes) {
        for (const change of changes) {
            if (change.type == "childList") change.addedNodes.forEach(translate);
            else translate(change.target);
        }
    }).observe(document.body, {
        childList: true, subtree: true, characterData: true, attributeFilter: ["placeholder", "title"],
    });
}

function loraclrClock(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    return Math.floor(whole / 60) + ":" + String(whole % 60).padStart(2, "0");
}

function loraclrProgressText(told) {
    if (told.state == "waiting") return loraclrSay("Waiting: {place} of {of}", told);
    const left = told.left == null ? "" : ", " + loraclrSay("{time} left", {time: loraclrClock(told.left)});
    return (told.stage || loraclrSay("Beginning")) + ": " + Math.floor(100 * told.share) + "%" + left;
}

// Shows a job's progress above a place, and its latest picture in it, until it has ended or does not begin.
function requestProgress(task, place, gallery, atEnd, onProgress, patience = 40) {
    const bar = document.createElement("div");
    bar.className = "progressDiv";
    bar.setAttribute("role", "progressbar");
    bar.setAttribute("aria-label", "Merge");
    const done = document.createElement("div");
    done.className = "progress";
    bar.append(done);
    place.parentNode.insertBefore(bar, place);
    const since = Date.now();
    let preview = null, seen = 0;

    function end() {
        bar.remove();
        if (preview) preview.remove();
        document.title = "LoRACLR Merge";
        atEnd();
    }

    function show(told) {
        done.textContent = loraclrProgressText(told);
        done.style.width = 100 * (told.share || 0) + "%";
        bar.setAttribute("aria-valuenow", Math.floor(100 * (told.share || 0)));
        document.title = "[" + Math.floor(100 * (told.share || 0)) + "%] LoRACLR Merge";
        if (!told.picture) return;
        if (!preview) {
            preview = document.createElement("div");
            preview.className = "livePreview";
            preview.append(new Image());
            gallery.prepend(preview);
        }
        preview.firstChild.src = told.picture;
        seen = told.seen;
    }

    async function ask() {
        let told = null;
        try {
            const answer = await fetch("loraclr/progress?task=" + encodeURIComponent(task) + "&seen=" + seen);
            told = await answer.json();
        } catch (error) {
            // The server is busy or gone; it is asked again until patience is at its end.
        }
        const heard = told && told.state != "unknown";
        if (heard ? told.state == "ended" : Date.now() - since > 1000 * patience) {
            end();
            return;
        }
        if (heard) {
            show(told);
            if (onProgress) onProgress(told);
        }
        setTimeout(ask, 400);
    }

    ask();
}
