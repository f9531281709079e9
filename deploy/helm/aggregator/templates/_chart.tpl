{{- /* What an aggregator has beside the shared parts: a Service for others, and the plan. */ -}}
{{- define "chart.role" -}}aggregator{{- end }}
{{- define "chart.open" -}}port 8443 from {{ .Values.networkPolicy.clients.from | empty | ternary "anywhere" "networkPolicy.clients.from" }}{{- end }}
{{- define "chart.kept" -}}the log, the models and the plans{{- end }}
{{- define "chart.tag" -}}{{ .Chart.AppVersion }}{{- end }}
{{- define "chart.check" -}}["site", "check", "--config", "/etc/wardround/config/config.yaml"]{{- end }}
{{- define "chart.resources" -}}{{ include "wardround.resources" .Values.resources }}{{- end }}
{{- define "chart.runtimeClass" -}}{{- end }}

{{- define "chart.config" -}}
listen: 0.0.0.0:8443
study: /etc/wardround/plan/study.yaml
{{- if .Values.charterSignatures }}
charter_signatures: /etc/wardround/documents/charter.signatures.yaml
{{- end }}
{{- end }}

{{- define "chart.documents" -}}
{{- with .Values.charterSignatures -}}
charter.signatures.yaml: {{ b64enc . }}
{{- end }}
{{- end }}

{{- define "chart.validate" -}}
{{- if not .Values.plan.study }}{{ fail "plan.study is empty: add --set-file plan.study=study.yaml" }}{{ end }}
{{- /* The API allows 256 KiB of annotations, and the stateful set's revisions hold them too. */}}
{{- if gt (len .Values.plan.study) 131072 }}
{{- fail (printf "plan.study has %d bytes, at most 131072 travel with a pod template: is it the right file?" (len .Values.plan.study)) }}
{{- end }}
{{- end }}

{{- /* What `kubectl rollout history` shows. */ -}}
{{- define "chart.annotations" -}}
kubernetes.io/change-cause: {{ printf "study %s (%s) through round %d" (get (fromYaml .Values.plan.study) "name" | default "without a name") (sha256sum .Values.plan.study | trunc 12) (int .Values.plan.throughRound) | quote }}
{{- end }}

{{- /* The plan is in the pod template itself, so a revision holds all of it and `kubectl rollout undo` brings it back. */ -}}
{{- define "chart.podAnnotations" -}}
wardround.internal/study: {{ toJson .Values.plan.study }}
{{- end }}

{{- define "chart.env" -}}
- {name: WARDROUND_THROUGH_ROUND, value: {{ .Values.plan.throughRound | int | quote }}}
{{- end }}

{{- define "chart.ports" -}}
- {name: grpc, containerPort: 8443}
{{- end }}

{{- define "chart.mounts" -}}
- {name: plan, mountPath: /etc/wardround/plan, readOnly: true}
{{- end }}

{{- define "chart.volumes" -}}
- name: plan
  downwardAPI:
    items:
      - path: study.yaml
        fieldRef: {fieldPath: "metadata.annotations['wardround.internal/study']"}
{{- end }}
