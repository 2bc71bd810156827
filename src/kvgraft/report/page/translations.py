"""The page's own words in Chinese, by their English."""

from __future__ import annotations

from kvgraft.report.page.data import Phrase

CHINESE = {
    # The frame of the page.
    "Skip to the content": "跳到正文",
    "dark": "深色",
    "light": "浅色",
    "More": "更多",
    "Get this again": "如何重现",
    "Written by kvgraft {version}. This file needs no network.": "由 kvgraft {version} 生成。本文件无需联网。",
    "from {teachers} to {student}": "从 {teachers} 到 {student}",
    "seed {seeds}": "随机种子 {seeds}",
    "seeds {seeds}": "随机种子 {seeds}",
    "{folder} has no {file}: training curves and gradient shares of seed {seed} are missing.": (
        "{folder} 中没有 {file}：缺少种子 {seed} 的训练曲线和梯度占比。"
    ),
    "There is no baseline arm: nothing here says what the teacher's knowledge was worth.": (
        "没有 baseline 组：本页无法说明教师知识带来了多少收益。"
    ),
    # Sections.
    "Results": "结果",
    "Curves": "曲线",
    "What moves the student": "什么在推动学生",
    "Layers": "层",
    "Tokens": "词元",
    "What the students write": "学生的生成",
    "What was run, and where": "实验设置与环境",
    "Experiment log": "实验日志",
    # Tables of results.
    "{arm} against the baseline": "{arm} 与 baseline 之差",
    "held-out loss {loss}": "留出集损失 {loss}",
    "held-out loss before": "训练前留出集损失",
    "held-out loss after": "训练后留出集损失",
    "against the baseline": "与 baseline 之差",
    "perplexity after": "训练后困惑度",
    "fall of the KV loss": "KV 损失降幅",
    "real tokens of those processed": "处理的词元中真实词元占比",
    "training time in seconds": "训练时间（秒）",
    "steps to the baseline's final loss": "达到 baseline 最终损失的步数",
    "held-out bits per byte after": "训练后留出集每字节比特数",
    "KV loss before": "训练前 KV 损失",
    "KV loss after": "训练后 KV 损失",
    "logit loss before": "训练前 logit 损失",
    "logit loss after": "训练后 logit 损失",
    "cross-entropy's share of the gradient": "交叉熵的梯度占比",
    "KV loss's share of the gradient": "KV 损失的梯度占比",
    "logit loss's share of the gradient": "logit 损失的梯度占比",
    "student KV deviation before": "训练前学生 KV 标准差",
    "student KV deviation after": "训练后学生 KV 标准差",
    "student KV effective rank before": "训练前学生 KV 有效秩",
    "student KV effective rank after": "训练后学生 KV 有效秩",
    "projector parameters": "投影器参数量",
    "arm": "实验组",
    "{arm} ({some} of {all} seeds)": "{arm}（{all} 个种子中的 {some} 个）",
    "Every arm at the end": "各实验组的最终结果",
    "KV loss, gradients and the student's own KV": "KV 损失、梯度与学生自身的 KV",
    "never": "未达到",
    "{steps}, {count} times never": "{steps}，{count} 次未达到",
    "One seed: how far another seed would land is unknown, so small differences between arms prove nothing.": (
        "只有一个种子：换一个种子的结果未知，因此实验组之间的微小差异不能说明问题。"
    ),
    "Mean over seeds; in brackets the standard deviation between them. Differences are within a seed.": (
        "各种子的平均值；括号内为种子间标准差。差值在同一种子内计算。"
    ),
    # Comparisons.
    "{count} arms": "{count} 个实验组",
    "{arm} against {against}": "{arm} 与 {against} 之差",
    "Every arm against {against}": "各实验组与 {against} 的比较",
    "Losses are held-out cross-entropy, mean over the seeds, in brackets the standard deviation between them. "
    "Differences are within a seed; interval and p: paired t-test, p corrected for the number of arms (Holm). "
    "Effect size: mean over deviation of the differences (Hedges). All of it is about this text: seeds say "
    "nothing of others.": (
        "损失为留出集交叉熵，取各种子的平均值，括号内为种子间标准差。差值在同一种子内计算；区间与 p 值来自配对 t 检验，"
        "p 值按实验组数校正（Holm）。效应量：差值的平均值除以其标准差（Hedges）。"
        "以上只针对这份文本，种子不能说明其他文本。"
    ),
    "verdict": "结论",
    "difference to {against}": "与 {against} 之差",
    "95 % interval": "95 % 区间",
    "effect size": "效应量",
    "p, corrected": "p（已校正）",
    "steps to {against}'s final loss": "达到 {against} 最终损失的步数",
    "seconds to {against}'s final loss": "达到 {against} 最终损失的秒数",
    "what the others are compared with": "其他组的比较对象",
    "not tested": "未检验",
    "no difference shown": "未显示差异",
    "worse": "更差",
    "better": "更好",
    "not from the teacher's knowledge": "并非来自教师的知识",
    "not told from its control": "与对照组无法区分",
    "none": "无",
    "not recorded": "未记录",
    "The arms, and the verdicts in full": "各实验组及完整结论",
    "Held-out loss of each seed": "各种子的留出集损失",
    "lowest on the way": "过程中的最低值",
    "Shares of the gradient, mean over training and seeds": "梯度占比（训练过程与种子的平均值）",
    "Notes": "备注",
    "Notes on the arms and from people": "关于实验组的备注与人工备注",
    "What each run noticed": "各次运行注意到的情况",
    "{some} of {all} runs do not lie beside the comparison as they were compared: their training curves "
    "are missing.": "{all} 次运行中有 {some} 次的文件夹不在比较结果旁或已改动：缺少其训练曲线。",
    "The command of each run": "每次运行的命令",
    # Curves.
    "step": "步",
    "whole range": "完整范围",
    "Lines are means over seeds, bands reach from the lowest to the highest.": "线为各种子的平均值，色带为最低到最高。",
    "Neighbouring steps are pooled: lines are their means, bands keep the extremes.": (
        "相邻的步已合并：线为其平均值，色带保留极值。"
    ),
    "Held-out loss (cross-entropy, nats per token)": "留出集损失（交叉熵，每词元 nat）",
    "Held-out KV loss (1 is what predicting the mean costs)": "留出集 KV 损失（1 等于只预测平均值）",
    "Training loss (cross-entropy, nats per token)": "训练损失（交叉熵，每词元 nat）",
    "KV loss in training (1 is what predicting the mean costs)": "训练 KV 损失（1 等于只预测平均值）",
    "Effective rank of the student's own KV (falls when it collapses)": "学生自身 KV 的有效秩（坍缩时下降）",
    "Standard deviation of the student's own KV (falls when it shrinks)": "学生自身 KV 的标准差（收缩时下降）",
    "Gradient norm": "梯度范数",
    "R² of the predicted keys, {teacher} (1 is exact, 0 the mean)": (
        "预测键的 R²，{teacher}（1 为完全一致，0 为平均值）"
    ),
    "R² of the predicted values, {teacher} (1 is exact, 0 the mean)": (
        "预测值的 R²，{teacher}（1 为完全一致，0 为平均值）"
    ),
    "Variance of the predicted KV over that of {teacher}": "预测 KV 的方差与 {teacher} 的方差之比",
    "Held-out KV loss, {teacher}": "留出集 KV 损失，{teacher}",
    "KV loss in training, {teacher}": "训练 KV 损失，{teacher}",
    "Held-out logit loss": "留出集 logit 损失",
    "Held-out logit loss, {teacher}": "留出集 logit 损失，{teacher}",
    "Logit loss in training": "训练 logit 损失",
    "Logit loss in training, {teacher}": "训练 logit 损失，{teacher}",
    "Mean weight of {teacher} at a token": "{teacher} 在每个词元上的平均权重",
    "Share of the adapters' hidden units that are never active, {teacher}": (
        "适配器中从未激活的隐藏单元占比，{teacher}"
    ),
    "Weight of the KV loss": "KV 损失的权重",
    "Weight of the logit loss": "logit 损失的权重",
    "What learned weights of the teachers add to the loss": "教师的可学习权重给损失增加的部分",
    "Seconds since training began": "训练开始以来的秒数",
    "Share of the {part} loss in the student's gradient": "{part} 损失在学生梯度中的占比",
    "Gradient norm of this part over the sum of the norms of all parts.": "该部分的梯度范数除以所有部分范数之和。",
    "No arm of this run has a second loss part whose share was measured.": "本次运行没有测量第二个损失部分的占比。",
    # Layers and tokens.
    "Layers of the student (below) and of {teacher} (above)": "学生的层（下）与 {teacher} 的层（上）",
    "Linear CKA of the student's and the teacher's KV": "学生与教师 KV 的线性 CKA",
    "R² of the teacher's KV from the student's, by least squares": "由学生 KV 经最小二乘预测教师 KV 的 R²",
    "Cosine of the teacher's KV and what least squares makes of the student's": (
        "教师 KV 与由学生 KV 经最小二乘所得预测的余弦"
    ),
    "R² of the run's own comparison, through the saved projector": "本次运行自身比较的 R²（经已保存的投影器）",
    "Cosine of the run's own comparison, through the saved projector": "本次运行自身比较的余弦（经已保存的投影器）",
    "Effective rank of the student's KV": "学生 KV 的有效秩",
    "Effective rank of the teacher's KV": "教师 KV 的有效秩",
    "Student layer ← teacher layer ({teacher}), held-out text, seed {seed}.": (
        "学生层 ← 教师层（{teacher}），留出文本，种子 {seed}。"
    ),
    "{share} of the student's text tokens have a teacher token ({teacher})": (
        "学生的文本词元中有 {share} 与教师词元对齐（{teacher}）"
    ),
    "All tokens of the training text, by whether and why not they are aligned.": (
        "训练文本的全部词元，按是否对齐及原因划分。"
    ),
    "have a teacher token": "与教师词元对齐",
    "stand for no text (such as end-of-text)": "不对应文本（如文本结束符）",
    "lie beyond the teacher's last token": "位于教师最后一个词元之后",
    "overlap no teacher token": "与任何教师词元都不重叠",
    "{reason}": "{reason}",
    "One text, two tokenizations: the student and {teacher}": "同一文本的两种切分：学生与 {teacher}",
    "The first {tokens} student tokens of the first training text. Each box is a token; what stands above each other "
    "has the same bytes. Point at a student token, or move through them with the arrow keys, to see the teacher tokens "
    "it learns from (policy: {policy}).": (
        "第一条训练文本的前 {tokens} 个学生词元。每个方框是一个词元，上下对应的部分字节相同。"
        "指向学生词元或用方向键移动，即可看到它所学习的教师词元（策略：{policy}）。"
    ),
    # Evaluation.
    "Evaluation": "评测",
    "Saved students on held-out text, seed {seed}": "已保存的学生在留出文本上的表现，种子 {seed}",
    "Tasks of lm-eval, seed {seed}": "lm-eval 任务，种子 {seed}",
    "Exact match on {data}, {shots} solved problems before each, seed {seed}": (
        "{data} 上的完全匹配率，每题前有 {shots} 道例题，种子 {seed}"
    ),
    "Sums are worked out for the student (calculator).": "算式由计算器代学生求值。",
    "exact match": "完全匹配",
    "Exact match on {problems} problems of {data}, {shots} solved ones before each": (
        "{data} 的 {problems} 道题上的完全匹配率，每题前有 {shots} 道例题"
    ),
    "Exact match on {problems} problems of {data}, {shots} solved ones before each, with the calculator": (
        "{data} 的 {problems} 道题上的完全匹配率，每题前有 {shots} 道例题，算式由计算器求值"
    ),
    "Bits per byte of held-out text": "留出文本的每字节比特数",
    "Of the runs that were evaluated; mean, and in brackets the standard deviation between seeds.": (
        "仅含已评测的运行；平均值，括号内为种子间标准差。"
    ),
    "mean": "平均值",
    "No run of this comparison was evaluated: {command} does it for one.": (
        "这次比较中还没有运行被评测：{command} 可评测其中一个。"
    ),
    "95 % interval (Wilson)": "95 % 区间（Wilson）",
    "with a final number": "给出最终数字",
    "empty answers": "空回答",
    "without room for an answer": "无回答空间",
    "tokens per second": "每秒词元数",
    # Samples, setting and log.
    "No answers yet: {command} writes them.": "尚无回答：运行 {command} 即可生成。",
    "Answers of every arm, seed {seed}": "各实验组的回答，种子 {seed}",
    "{shown} of {all} problems; all answers are in {file}.": "显示 {all} 题中的 {shown} 题；全部回答见 {file}。",
    "prompt": "提示",
    "expected": "参考答案",
    "(empty)": "（空）",
    "{count} more": "另有 {count} 条",
    "Setting": "设置",
    "teacher": "教师",
    "student": "学生",
    "text": "文本",
    "training texts / tokens": "训练文本数 / 词元数",
    "held-out texts": "留出文本数",
    "training texts cut to the maximum length": "被截断的训练文本数",
    "objective": "目标",
    "projector": "投影器",
    "steps x batch": "步数 x 批大小",
    "machine": "机器",
    "not recorded by this run": "本次运行未记录",
    "versions": "版本",
    "Costs, seed {seed}": "开销，种子 {seed}",
    "{teacher}: tokens per second": "{teacher}：每秒词元数",
    "not run: all KV was stored": "未运行：全部 KV 已存储",
    "run in every step": "每一步都运行",
    "{teacher}: store": "{teacher}：存储",
    "{size}, {bytes} bytes a token": "{size}，每词元 {bytes} 字节",
    "time: {phase}": "耗时：{phase}",
    "{file}, seed {seed}": "{file}，种子 {seed}",
}


def in_chinese(phrase: Phrase) -> str:
    """``phrase`` in Chinese, its values filled in.

    Raises:
        KeyError: it has no counterpart; add one to :data:`CHINESE`.
    """
    return CHINESE[phrase.english].format(**phrase.values)
