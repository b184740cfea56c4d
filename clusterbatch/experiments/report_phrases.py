"""The phrases of a workspace's report by language, where those of a comparison (phrases.py) do not serve."""

# A sentence is one line: it is easier to translate than one in pieces.
# ruff: noqa: E501

from __future__ import annotations

from clusterbatch.experiments.phrases import PHRASES

_ENGLISH = {
    "report_title": "Does the model retrieve better after training?",
    "leading": "{metric} on {collection}: {before:.4f} before, {after:.4f} after training ({difference}), over {queries:,} judged queries and {documents:,} documents.",
    "not_measured": "Not measured yet: the evaluation has not run in this workspace.",
    "to_comparison": "Do clustered batches pay here? The comparison",
    "quality": "Quality",
    "quality_text": "Averages over all judged queries; a query without an answer counts 0. The interval is over queries (paired t, 95 %): another seed of the training is not in it.",
    "measure": "Measure",
    "documents": "Documents",
    "winners_text": "{metric}, after minus before, for the test queries of each source with at least {least} of them.",
    "rows_read": "Rows read",
    "all_stages": "All stages",
    "run_text": "Save the configuration below as run.yaml and run:",
}

_JAPANESE = {
    "report_title": "学習後の検索は良くなったか",
    "leading": "{collection} の {metric}: 学習前 {before:.4f}、学習後 {after:.4f}({difference})。判定済みクエリ {queries:,} 件、文書 {documents:,} 件。",
    "not_measured": "未測定です。このワークスペースではまだ評価が実行されていません。",
    "to_comparison": "クラスタ別バッチは引き合うか(比較の報告)",
    "quality": "品質",
    "quality_text": "判定済みの全クエリの平均。答えのないクエリは 0 と数えます。区間はクエリについてのもの(対応のある t、95 %)で、学習のシードの違いは含みません。",
    "measure": "指標",
    "documents": "文書数",
    "winners_text": "クエリが {least} 件以上あるソースごとの {metric} の差(学習後 − 学習前)。",
    "rows_read": "読込行数",
    "all_stages": "全段階",
    "run_text": "下の設定を run.yaml として保存し、次を実行します。",
}

REPORT_PHRASES: dict[str, dict[str, str]] = {
    "en": {**PHRASES["en"], **_ENGLISH},
    "ja": {**PHRASES["ja"], **_JAPANESE},
}
