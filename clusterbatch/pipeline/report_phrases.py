"""The phrases of a workspace's report by language, where those of a comparison (phrases.py) do not serve."""

# A sentence is one line: it is easier to translate than one in pieces.
# ruff: noqa: E501

from __future__ import annotations

from clusterbatch.pipeline.phrases import PHRASES

_ENGLISH = {
    "report_title": "Does the model retrieve better after training?",
    "leading": "{metric} on {collection}: {before:.4f} before, {after:.4f} after training ({difference}), over {queries:,} judged queries and {documents:,} documents.",
    "not_measured": "Not measured yet: the evaluation has not run in this workspace.",
    "to_comparison": "Which batches pay here? The comparison",
    "quality": "Quality",
    "quality_text": "Averages over all judged queries; a query without an answer counts 0. The interval is over queries (paired t, 95 %): another seed of the training is not in it.",
    "measure": "Measure",
    "documents": "Documents",
    "winners_text": "{metric}, after minus before, for the test queries of each source with at least {least} of them.",
    "rows_read": "Rows read",
    "all_stages": "All stages",
    "generations": "Generations",
    "generations_text": "Each round of refresh goes on from the live model. Drift: share of sampled rows that change clusters, beyond those that would by chance. Hardness: what new clusters add to the mean cosine of a query with the other documents of its cluster. A round goes live when its measure is no more than the margin below the live one's. Live now: generation {live}.",
    "goes_on_from": "From",
    "clusters_of": "Clusters of",
    "meanwhile": "built during {steps:,} steps",
    "drift": "Drift",
    "mutual_information": "Mutual information",
    "movement": "Movement",
    "harder": "Hardness",
    "steps_trained": "Steps",
    "live_before": "Live before",
    "own_value": "Its own",
    "went_live": "Went live",
    "minutes_taken": "Minutes",
    "reindexing": "Re-indexing",
    "reindexing_text": "{documents:,} documents, {minutes:.1f} min",
    "round_yes": "yes",
    "round_no": "no",
    "round_back": "rolled back",
    "round_open": "under way",
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
    "generations": "世代",
    "generations_text": "更新は毎回、公開中のモデルから続けます。ドリフトは、標本の行のうち偶然を超えてクラスタを移るものの割合。難度は、新しいクラスタでクエリと同じクラスタの他の文書との平均コサインがどれだけ上がるか。指標の低下が許容幅以内の世代だけが公開されます。公開中は世代 {live} です。",
    "goes_on_from": "元の世代",
    "clusters_of": "クラスタの世代",
    "meanwhile": "{steps:,} ステップの間に作成",
    "drift": "ドリフト",
    "mutual_information": "相互情報量",
    "movement": "移動",
    "harder": "難度",
    "steps_trained": "ステップ",
    "live_before": "公開中の値",
    "own_value": "この世代の値",
    "went_live": "公開",
    "minutes_taken": "分",
    "reindexing": "再索引",
    "reindexing_text": "文書 {documents:,} 件、{minutes:.1f} 分",
    "round_yes": "はい",
    "round_no": "いいえ",
    "round_back": "取り消し",
    "round_open": "進行中",
    "run_text": "下の設定を run.yaml として保存し、次を実行します。",
}

REPORT_PHRASES: dict[str, dict[str, str]] = {
    "en": {**PHRASES["en"], **_ENGLISH},
    "ja": {**PHRASES["ja"], **_JAPANESE},
}
