"""All texts of the page, in English and in Chinese.

The browser translates fixed labels (`i18n`). The page's process fills in the texts of a reply, in
the language that the browser asks for (`words_for`).
"""

from collections.abc import Callable

import gradio as gr

Words = Callable[..., str]

TEXTS = {
    # key: (English, Chinese)
    "title": ("Llama 3 chat", "Llama 3 对话"),
    "new": ("New conversation", "新对话"),
    "conversations": ("Conversations", "对话列表"),
    "settings": ("Settings", "设置"),
    "message": ("Message", "消息"),
    "ask": (
        "Type a message. Enter sends it, Shift+Enter starts a new line.",
        "输入消息，Enter 发送，Shift+Enter 换行",
    ),
    "chat": ("Conversation", "对话内容"),
    "welcome": (
        "### What would you like to talk about?\n\nReplies appear as the model writes them.",
        "### 想聊点什么？\n\n回复会边生成边显示。",
    ),
    "go_on": ("Continue", "继续生成"),
    "again": ("Try again", "重试"),
    "export_markdown": ("Export .md", "导出 .md"),
    "export_json": ("Export .json", "导出 .json"),
    "you": ("You", "你"),
    "model": ("Model", "模型"),
    "send": ("Send", "发送"),
    "halt": ("Stop", "停止"),
    "edit": ("Edit your message", "编辑消息"),
    # settings
    "preset": ("Preset", "预设"),
    "preset_none": ("None", "无"),
    "preset_brief": ("Brief", "简洁"),
    "preset_teacher": ("Teacher", "老师"),
    "preset_programmer": ("Programmer", "程序员"),
    "preset_translator": ("Translator", "翻译"),
    "system_prompt": ("System prompt", "系统提示词"),
    "system_prompt_hint": ("Tell the model how to answer", "告诉模型该怎样回答"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": (
        "0 always picks the most likely token",
        "设为 0 时，始终选择概率最高的 token",
    ),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "top_k_info": ("0 means no limit", "0 表示不限"),
    "min_p": ("Min-p", "Min-p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "min_new_tokens": ("Minimum tokens", "最少 token 数"),
    "max_new_tokens": ("Maximum tokens", "最多 token 数"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("Random if empty", "留空则随机"),
    "stop": ("Stop strings", "停止字符串"),
    "stop_info": ("One per line; any of them ends the reply", "每行一个，遇到任意一个即结束回复"),
    "between": ("Allowed range: {least} to {greatest}", "取值范围：{least} 至 {greatest}"),
    "reset": ("Reset to the model's defaults", "恢复模型默认值"),
    # tokens
    "token_view": ("Token view", "Token 视图"),
    "token_view_info": (
        "Colours each token of new replies by its probability, and lets you pick alternatives",
        "按概率为新回复中的每个 token 着色，并可改选其他候选 token",
    ),
    "tokens_hint": (
        "The stronger the colour, the less likely the token. Point at a token, tap it, or reach it "
        "with the Tab key to see its alternatives. Pick one to continue the reply from there.",
        "颜色越深，概率越低。鼠标指向、轻点或用 Tab 键移到某个 token，即可查看其他候选；"
        "选中一个，回复就从那里继续生成。",
    ),
    "tokens_none": (
        "Send a message to see its reply here, token by token.",
        "发送消息后，这里会逐个 token 显示回复。",
    ),
    # a reply
    "thinking": ("Thinking…", "思考中…"),
    "thought": ("Thoughts", "思考过程"),
    "queued": ("Position {position} in the queue", "排队中，第 {position} 位"),
    "reading": ("Reading {prompt} prompt tokens", "正在读取提示词，共 {prompt} 个 token"),
    "asking": ("Contacting the service", "正在连接服务"),
    "prompt": ("{prompt} prompt tokens", "提示词 {prompt} 个 token"),
    "cached": ("{cached} from the cache", "其中 {cached} 个来自缓存"),
    "first": ("first token after {ms} ms", "首个 token 用时 {ms} 毫秒"),
    "rate": ("{rate} tokens/s", "{rate} token/秒"),
    "written": ("{n} tokens written", "生成 {n} 个 token"),
    "context": ("context {used} of {whole}", "上下文 {used} / {whole}"),
    "trimmed": ("earlier messages left out: {n}", "已省略较早的 {n} 条消息"),
    "ended_stop": ("complete", "已完成"),
    "ended_length": ("reached the length limit", "已达长度上限"),
    "ended_abort": ("stopped", "已停止"),
    "used": ("Settings used", "所用设置"),
    # errors
    "away": (
        "Cannot reach the service. Start llama3_service.py, then try again.",
        "无法连接服务。请启动 llama3_service.py，然后重试。",
    ),
    "loading": (
        "The service is loading its model or shutting down. Try again in a moment.",
        "服务正在加载模型或正在关闭，请稍后重试。",
    ),
    "full": (
        "The service is busy and its queue is full. Try again in a moment.",
        "服务繁忙，队列已满，请稍后重试。",
    ),
    "key": (
        "The service needs a valid API key. Ask the person who runs this page to set "
        "LLAMA3_API_KEY and restart the page's server.",
        "服务需要有效的 API 密钥。请联系管理员设置 LLAMA3_API_KEY，并重启页面服务。",
    ),
    "too_long": (
        "This is too long for the model's context. Shorten it, or start a new conversation.",
        "内容超出模型的上下文长度。请缩短内容，或开始新对话。",
    ),
    "broken": (
        "The connection to the service was lost. Continue from the text so far, or try again.",
        "与服务的连接已断开。可以从已有内容继续生成，也可以重试。",
    ),
    "refused": ("The service could not reply: {why}", "服务无法回复：{why}"),
    "not_a_conversation": (
        "This file is not a conversation that this page exported as JSON.",
        "这不是本页面导出的 JSON 对话文件。",
    ),
    "no_reply": ("This message has no reply yet.", "这条消息还没有回复。"),
    "too_large": (
        "This is too long to be saved. Shorten the message, or start a new conversation.",
        "内容过长，无法保存。请缩短消息，或开始新对话。",
    ),
    "failed": (
        "Something went wrong on this page. The server's log has the details. You see the last "
        "saved state.",
        "页面出错，详情见服务器日志。当前显示的是最近一次保存的内容。",
    ),
    "ready": ("context length: {context} tokens", "上下文长度：{context} 个 token"),
    # the list of conversations; only the browser uses these texts
    "kept_where": (
        "Saved only in this browser, not on the server.",
        "对话只保存在此浏览器中，不会存到服务器。",
    ),
    "none_yet": ("No conversations yet.", "还没有对话。"),
    "delete": ("Delete", "删除"),
    "delete_sure": ("Delete this conversation?", "确定删除这个对话吗？"),
    "import": ("Import .json", "导入 .json"),
    "storage_full": (
        "Not saved: the browser's storage is full. Export this conversation, then delete others.",
        "未能保存：浏览器存储空间已满。请先导出此对话，再删除其他对话。",
    ),
    "file_too_large": ("This file is too large.", "文件太大。"),
}

PRESETS = {
    # preset: its system prompt, in both languages
    "preset_none": ("", ""),
    "preset_brief": ("Answer in as few words as possible.", "请用尽量少的字回答。"),
    "preset_teacher": (
        "You are a patient teacher. Explain step by step, with an example, and end with one "
        "question that checks understanding.",
        "你是一位耐心的老师。请一步一步讲解并举例，最后提一个检查理解的问题。",
    ),
    "preset_programmer": (
        "You are an experienced programmer. Answer with working code first, then explain it "
        "briefly.",
        "你是一位经验丰富的程序员。请先给出可以运行的代码，再作简短说明。",
    ),
    "preset_translator": (
        "Translate what you are given: Chinese into English, anything else into Chinese. Give the "
        "translation alone.",
        "翻译用户给出的内容：中文译成英文，其他语言译成中文。只给出译文。",
    ),
}

_COLUMNS = {"en": 0, "zh": 1}
_ENGLISH, _CHINESE = ({key: text[n] for key, text in TEXTS.items()} for n in _COLUMNS.values())

i18n = gr.I18n(en=_ENGLISH, zh=_CHINESE, **{"zh-CN": _CHINESE, "zh-TW": _CHINESE})


def language_of(request: gr.Request | None) -> str:
    """Return "zh" if the browser prefers Chinese, else "en"."""
    accepted = request.headers.get("accept-language", "") if request else ""
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def words_for(language: str) -> Words:
    """Return a function that looks up a text by its key and fills in its placeholders."""
    column = _COLUMNS[language]
    return lambda key, **values: TEXTS[key][column].format(**values)


def words_of(request: gr.Request | None) -> Words:
    return words_for(language_of(request))


def preset(name: str, language: str) -> str:
    """The system prompt of a preset."""
    return PRESETS[name][_COLUMNS[language]]


def preset_of(system_prompt: str) -> str | None:
    """The preset with this system prompt in any language; None if no preset has it."""
    return next((name for name, prompts in PRESETS.items() if system_prompt in prompts), None)


def texts(*keys: str) -> dict[str, dict[str, str]]:
    """The texts that the page's scripts show, in each language."""
    return {lang: {key: TEXTS[key][n] for key in keys} for lang, n in _COLUMNS.items()}
